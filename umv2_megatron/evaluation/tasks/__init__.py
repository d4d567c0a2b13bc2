"""Synthetic tasks with exact scoring: seeded, self-made, in short made-up words that any tokenizer handles.

words.py           made-up words and the random streams of examples
base.py            what an example and a task are; filling a context of a given length
context_tasks.py   six tasks whose answer stands in the prompt
symbol_tasks.py    the same six in symbols of one token each, for models of a few layers
fact_recall.py     facts that stand only in the training documents
mixture.py         training documents of any of them
scoring.py         from a model's token scores to the numbers reported
"""
