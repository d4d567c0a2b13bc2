"""Synthetic tasks: seeded, apart from training, answerable by reading, and scored as the definitions say."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from task_oracle import Oracle, OracleModel, SymbolOracle, UniformModel

from umv2_megatron.data.indexing import read_index
from umv2_megatron.data.tokenizers import ByteLevelTokenizer, HuggingFaceTokenizer
from umv2_megatron.evaluation.tasks import mixture, symbol_tasks
from umv2_megatron.evaluation.tasks.base import FORMS, SYMBOLS, Example, largest
from umv2_megatron.evaluation.tasks.context_tasks import COUNTED
from umv2_megatron.evaluation.tasks.fact_recall import RELATIONS, VALUES, FactSet
from umv2_megatron.evaluation.tasks.scoring import answer_row, score, summarize

ROOT = Path(__file__).resolve().parents[3]
BYTES = ByteLevelTokenizer()
FACTS = FactSet(seed=3, per_frequency=64, max_frequency=4)


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """A small BPE tokenizer, whose words take different numbers of tokens."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [each.text for each in mixture.training_documents(["key-value", "needle"], 20, 1, [1], [300], BYTES)], trainer
    )
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(file))
    return HuggingFaceTokenizer(str(file))


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    file = tmp_path_factory.mktemp("symbols") / "symbols.tokenizer.json"
    symbol_tasks.write_tokenizer(file)
    return HuggingFaceTokenizer(str(file))


def training_documents(*arguments, **options):
    return list(mixture.training_documents(*arguments, **options))


def asked(name: str, form: str, count: int, difficulty: int = 1, seed: int = 1, tokenizer=BYTES, budget: int = 320):
    return mixture.questions(name, form, count, seed, difficulty, tokenizer, budget)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", mixture.CONTEXT_TASKS)
def test_an_oracle_that_reads_scores_everything(name, form):
    for difficulty, budget in ((1, 256), (3, 700)):
        examples = asked(name, form, 12, difficulty, budget=budget)
        model = OracleModel(Oracle(name, form, difficulty), BYTES)
        summary = summarize(examples, score(model, examples, batch=7))
        assert summary.exact_match == summary.choice_accuracy == 1.0, (name, form, difficulty)
        assert summary.exact_match_se == summary.choice_accuracy_se == 0.0
        assert summary.answer_nats_per_token == pytest.approx(-math.log(0.99), rel=1e-5)
        assert 0 < summary.exact_match_chance <= 0.5


@pytest.mark.parametrize("difficulty", [1, 2, 4])
@pytest.mark.parametrize("name", symbol_tasks.SYMBOL_TASKS)
def test_an_oracle_that_reads_symbols_scores_everything(name, difficulty, symbols):
    for budget in (48, 128, 256):
        examples = asked(name, SYMBOLS, 12, difficulty, tokenizer=symbols, budget=budget)
        model = OracleModel(SymbolOracle(name, difficulty), symbols)
        summary = summarize(examples, score(model, examples, batch=7))
        assert summary.exact_match == summary.choice_accuracy == 1.0
        assert 0 < summary.exact_match_chance <= 0.5
        for example in examples:
            words = [*(example.prompt + example.answer).split()]
            assert symbols.detokenize(symbols.tokenize(" ".join(words))) == " ".join(words)
            assert budget - 16 < len(words) <= budget, "the context is filled, a token for each word"


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_items_as_asked_for_fill_the_context(name, symbols):
    """Items told before all of them fill the context: the oracle still answers, and there are no other items."""
    told_of = {  # what tells an item, in words and in symbols; an item's place among those of a row
        "key-value": (r"^\w+ = \w+$", r"s\d+ s\d+"),
        "multi-round": (r"^user: set \w+ \w+$", r"(?<![?] )\bs\d+ s\d+(?! \.)"),
        "icl": (r"^\w+: \w+$", r"s\d+ s\d+ s\d+"),
    }[name]
    for form, tokenizer, budget in (("trained", BYTES, 640), (SYMBOLS, symbols, 128)):
        for count, difficulty in ((4, 1), (8, 2)):
            made = mixture.questions(name, form, 6, 1, difficulty, tokenizer, budget, count)
            oracle = SymbolOracle(name, difficulty) if form == SYMBOLS else Oracle(name, form, difficulty)
            assert summarize(made, score(OracleModel(oracle, tokenizer), made)).exact_match == 1.0
            for example in made:
                length = len(tokenizer.tokenize(example.prompt + example.answer))
                assert budget - (30 if form == "trained" else 3) < length <= budget, "no room for one more"
                assert example.details[COUNTED[name]] == count
                if name == "key-value" and difficulty > 1:
                    continue  # values of two words
                context = example.prompt.rpartition("?" if form == SYMBOLS else "\n")[0].removeprefix("@" + name)
                found = re.findall(told_of[form == SYMBOLS], context, re.MULTILINE)
                assert len(found) > count
                assert found == (len(found) * found[-count:])[-len(found) :], "the same items in turn"
    for form in FORMS:
        assert mixture.questions(name, form, 1, 1, 1, BYTES, 900, 8)[0].details[COUNTED[name]] == 8
    sentence = f"holds 32; the smallest example of {name} with 90 {COUNTED[name]}, symbols form, takes"
    with pytest.raises(ValueError, match=sentence):
        mixture.questions(name, SYMBOLS, 1, 1, 1, symbols, 32, 90)
    with pytest.raises(ValueError, match=f"--num-{COUNTED[name]} holds 1; {name} of --difficulty 3 takes"):
        mixture.questions(name, SYMBOLS, 1, 1, 3, symbols, 64, 1)


def test_documents_of_several_links_ask_for_fewer_too(symbols):
    (document,) = training_documents(["multi-hop"], 1, 1, [3], [128], None, 64)
    assert {query.prompt.split()[0] for query in document.queries} == {"1", "2", "3"}
    assert len({query.prompt for query in document.queries}) == len(document.queries)
    assert {e.prompt.split()[-2] for e in asked("multi-hop", SYMBOLS, 9, 3, tokenizer=symbols, budget=128)} == {"3"}


def test_documents_in_symbols_are_what_is_asked(symbols):
    names = list(symbol_tasks.SYMBOL_TASKS)
    made = training_documents(names, 60, 1, [1, 2], [48, 64, 128], None, 64)
    assert made == training_documents(names, 60, 1, [1, 2], [48, 64, 128], None, 64)
    documents = [each.text for each in made]
    assert {document.split()[0] for document in documents} == {symbol_tasks.task_symbol(name) for name in names}
    for document in documents:
        assert 16 <= len(symbols.tokenize(document)) == len(document.split()) <= 128
    for each in made:
        words, marks = each.text.split(), symbol_tasks.loss_marks(each).split()
        assert len(words) == len(marks) and set(marks) == {"0", "1"}
        name, last = words[0].removeprefix("@"), len(words) - words[::-1].index("?")
        cue = 2 if name in ("memorize", "icl", "multi-hop") else 1
        answer = marks[last:].index("0", cue) - cue if "0" in marks[last + cue :] else len(marks) - last - cue
        oracle = SymbolOracle(name, answer)
        for at in range(last, len(words), cue + answer):  # each question alone, behind the context
            _, told = oracle.read(" ".join([*words[:last], *words[at : at + cue]]))
            assert told.split() == words[at + cue : at + cue + answer]
            assert marks[at : at + cue + answer] == ["0"] * cue + ["1"] * answer
        for at in range(last):
            assert marks[at] == ("1" if words[at + 1 : at + 2] == ["."] else "0")
    asks = [document for document in documents if document.startswith("@key-value")]
    for words in (document.split() for document in asks):
        told, questions = words[1 : words.index("?")], words[words.index("?") + 1 :]
        assert len(told) == len(questions) and told != questions, "every pair is asked for, in another order"
    with pytest.raises(ValueError, match=r"different symbols; expected at most 256"):
        asked("key-value", SYMBOLS, 1, tokenizer=symbols, budget=602)


def test_contexts_of_a_curriculum_grow():
    """The shortest documents first, then longer ones among them; the lowest difficulty where a higher has no room."""
    names, lengths = list(symbol_tasks.SYMBOL_TASKS), [16, 64, 128]
    made = training_documents(names, 600, 1, [1, 2], lengths, None, 64, curriculum=0.5)
    documents = [each.text for each in made]
    sizes = [len(document.split()) for document in documents]
    for stage, most in enumerate(lengths):
        first, end = 100 * stage, 100 * (stage + 1) if stage < 2 else 600
        assert max(sizes[first:end]) <= most and max(sizes[first:end]) > (0 if stage == 0 else lengths[stage - 1])
    assert min(sizes[200:]) <= 16
    links = [re.findall(r"\? (\d) ", document) for document in documents if document.startswith("@multi-hop")]
    assert {number for each in links[: 100 // 6] for number in each} == {"1"}, "two links take 20 tokens"
    assert {number for each in links for number in each} == {"1", "2"}
    assert [document.split()[0] for document in documents] == [symbol_tasks.task_symbol(name) for name in names] * 100
    with pytest.raises(ValueError, match="--difficulty holds 12; multi-hop in symbols takes at most 9 links"):
        training_documents(["multi-hop"], 60, 1, [1, 12], lengths, None, 64, curriculum=0.5)


@pytest.mark.parametrize("slope", [1, 3, 17])
def test_the_largest_that_fits_is_found_with_few_tries(slope):
    for budget in range(60, 2000, 37):
        tried: list[int] = []
        found = largest(lambda n, tried=tried: tried.append(n) or n, lambda n: 40 + slope * n, budget, "x")
        assert found == (budget - 40) // slope and len(tried) <= 14 and max(tried) <= max(found, 1) + 1
    steps = largest(lambda n: n, lambda n: 10 + 7 * (n // 8), 50, "x")  # level, then steep
    assert steps == 47


@pytest.mark.parametrize("name", ["memorize", "icl", "needle"])
def test_subword_tokens_score_alike(name, subwords):
    examples = asked(name, "trained", 8, tokenizer=subwords, budget=128)
    assert max(len(answer_row(subwords, 0, e.prompt, c)[0]) - 1 for e in examples for c in e.choices) <= 128
    scored = score(OracleModel(Oracle(name, "trained"), subwords), examples)
    assert all(each.exact and each.chosen == 1.0 for each in scored)


def test_a_uniform_model_is_at_chance():
    for name in mixture.CONTEXT_TASKS:
        examples = asked(name, "trained", 10)
        summary = summarize(examples, score(UniformModel(BYTES), examples))
        assert summary.exact_match == 0.0
        assert summary.choice_accuracy == pytest.approx(summary.choice_accuracy_chance)
        assert summary.answer_nats_per_token == pytest.approx(math.log(257), rel=1e-6)
        assert summary.answer_nats == pytest.approx(sum(len(e.answer) for e in examples) / 10 * math.log(257), rel=1e-6)


def test_chance_counts_what_who_knows_the_format_chooses_from():
    for difficulty in (1, 2):
        for example in asked("multi-hop", "trained", 10, difficulty, budget=500):
            links = dict(re.findall(r"^(\w+) > (\w+)$", example.prompt, re.MULTILINE))
            ends = set()
            for word in links.keys() - links.values():  # where a chain begins
                for _ in range(difficulty):
                    word = links[word]
                ends.add(f" {word}\n")
            assert example.answer in ends and len(ends) == example.candidates
        for example in asked("multi-round", "trained", 10, difficulty, budget=500):
            last = dict(re.findall(r"^user: set (\w+) (\w+)$", example.prompt, re.MULTILINE))
            assert len(set(last.values())) == example.candidates


def test_facts_are_told_as_often_as_they_should_be_and_recalled():
    documents = FACTS.documents()
    facts = FACTS.facts()
    text = "\n".join(documents)
    assert [fact.times for fact in facts] == [0] * 64 + [1] * 64 + [2] * 64 + [4] * 64
    assert len({fact.person for fact in facts}) == len(facts)
    for fact in facts:
        assert text.count(fact.person) == fact.times
    for relation in RELATIONS:
        for value in FACTS.values[relation]:
            assert len(re.findall(rf"{relation}\b[^.]* {value}\.", text)) == 7 * 64 // (VALUES * len(RELATIONS))
    for form in FORMS:
        questions = FACTS.questions(form, limit=20)
        scored = score(OracleModel(Oracle("fact-recall", form, documents=documents), BYTES), questions)
        assert len(questions) == 80
        for example, each in zip(questions, scored):
            assert each.exact == (example.details["times_seen"] > 0)
    assert not any("Question" in document for document in documents)


def test_seeds_decide_and_training_is_apart():
    for name in mixture.CONTEXT_TASKS:
        one, again, other = (asked(name, "trained", 5, seed=seed) for seed in (1, 1, 2))
        assert one == again and asked(name, "trained", 8)[:5] == one
        assert not {e.prompt for e in one} & {e.prompt for e in other}
    made = training_documents(mixture.TASKS, 60, 1, [1, 2], [300, 400], BYTES, facts=FACTS)
    assert made == training_documents(mixture.TASKS, 60, 1, [1, 2], [300, 400], BYTES, facts=FACTS)
    documents = [each.text for each in made]
    assert len(documents) == 60 + len(FACTS.documents())
    held = "".join(documents)
    for name in mixture.CONTEXT_TASKS:
        for example in asked(name, "trained", 20):
            # what is asked for and answered stands in no training document
            assert "\n".join((example.prompt + example.answer).splitlines()[-2:]) not in held
    # FactSet of another seed has other people
    assert not {f.person for f in FACTS.facts()} & {f.person for f in FactSet(4, 64, 4).facts()}


def test_prompts_fill_the_context_and_grow_with_it():
    for name in mixture.CONTEXT_TASKS:
        for form in FORMS:
            for budget in (256, 1024):
                for example in asked(name, form, 4, budget=budget):
                    longest = max(len(example.prompt + answer) for answer in example.choices)
                    assert 0.6 * budget < longest <= budget, (name, form, budget, longest)
                    assert len(set(example.choices)) == len(example.choices) >= 2
                    assert len({len(answer) for answer in example.choices}) == 1
                    assert (example.prompt + example.answer).isascii()
    with pytest.raises(ValueError, match="--context-lengths"):
        asked("memorize", "trained", 1, budget=20)


def test_answer_tokens_where_prompt_and_answer_merge():
    class Pairs(ByteLevelTokenizer):
        """Two characters a token, so that an odd prompt shares a token with its answer."""

        def tokenize(self, text):
            return [hash(text[at : at + 2]) % 250 for at in range(0, len(text), 2)]

    assert answer_row(BYTES, 256, "ab:", " cd")[1] == 1 + 3
    ids, start = answer_row(Pairs(), 256, "ab:", " cd")
    assert len(ids) == 1 + 3 and start == 1 + 1
    ids, start = answer_row(Pairs(), 256, "abc:", " cd")
    assert len(ids) == 1 + 4 and start == 1 + 2


def test_standard_errors_and_ties():
    examples = [Example("p:", f" {letter}", (" a", " b"), 4) for letter in "aabb"]

    class Prefers(UniformModel):
        """Likes every ``a``."""

        def logprobs(self, tokens):
            found = super().logprobs(tokens)
            return found._replace(log_likelihood=found.log_likelihood + (tokens[:, 1:] == ord("a")))

    summary = summarize(examples, score(Prefers(BYTES), examples))
    alone = [dataclasses.replace(example, choices=()) for example in examples]
    without = summarize(alone, score(Prefers(BYTES), alone))
    assert (without.choice_accuracy, without.choice_accuracy_se, without.choice_accuracy_chance) == (None, None, None)
    assert without.answer_nats == summary.answer_nats
    assert (summary.choice_accuracy, summary.choice_accuracy_chance, summary.exact_match_chance) == (0.5, 0.5, 0.25)
    # sample standard deviation of 1 1 0 0 is sqrt(1/3), over the square root of four
    assert summary.choice_accuracy_se == pytest.approx(math.sqrt(1 / 3) / 2)


def test_rows_beyond_the_model_are_refused():
    model = UniformModel(BYTES)
    model.longest_context = 100
    with pytest.raises(ValueError, match="100"):
        score(model, asked("icl", "trained", 1))


def call(monkeypatch, capsys, name: str, *arguments: str) -> tuple[int, str, str]:
    """A tool as a command, in this process: exit code, output and errors."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_there_are_names_for_the_most_facts_that_are_allowed():
    most = FactSet(max_frequency=2048, per_frequency=19648)  # 13 frequencies
    facts = most.facts()
    assert len({fact.person for fact in facts}) == len(facts) == 13 * 19648
    with pytest.raises(ValueError, match="at most 19648 with --max-fact-frequency 2048"):
        FactSet(max_frequency=2048, per_frequency=19712)


def test_the_tool_writes_what_preprocessing_reads(tmp_path, monkeypatch, capsys):
    output = tmp_path / "tasks.jsonl"
    code, told, _ = call(monkeypatch, capsys, "make_tasks.py", "--task", "icl,fact-recall", "--documents", "20",
                         "--max-fact-frequency", "2", "--lengths", "200,300", "--output", str(output))  # fmt: skip
    assert code == 0 and str(output) in told
    documents = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert len(documents) == 20 + len(FactSet(1, 64, 2).documents())
    code, told, _ = call(monkeypatch, capsys, "preprocess_data.py", "--input", str(output), "--append-eod",
                         "--output-prefix", str(tmp_path / "t"), "--tokenizer-type", "ByteLevelTokenizer")  # fmt: skip
    assert code == 0 and f"{len(documents)} documents" in told
    signs = tmp_path / "signs.jsonl"
    code, told, _ = call(monkeypatch, capsys, "make_tasks.py", "--preset", "learnable", "--task", "needle,multi-hop",
                         "--documents", "9", "--output", str(signs))  # fmt: skip
    assert code == 0 and "9 documents" in told
    code, told, _ = call(monkeypatch, capsys, "preprocess_data.py", "--input", str(signs), "--append-eod",
                         "--output-prefix", str(tmp_path / "s"), "--tokenizer-type", "HuggingFaceTokenizer",
                         "--tokenizer-model", str(tmp_path / "signs.tokenizer.json"))  # fmt: skip
    assert code == 0 and "9 documents" in told
    code, told, _ = call(monkeypatch, capsys, "preprocess_data.py", "--input", str(signs), "--append-eod",
                         "--output-prefix", str(tmp_path / "s"), "--json-keys", "loss",
                         "--tokenizer-type", "NullTokenizer", "--vocab-size", "2")  # fmt: skip
    assert code == 0 and "9 documents" in told
    lengths = [read_index(str(tmp_path / f"s_{key}_document")).lengths.tolist() for key in ("text", "loss")]
    assert lengths[0] == lengths[1] and sum(lengths[0]) > 9 * 8
    for arguments, words in (
        (["--task", "all", "--preset", "learnable"], "--task holds 'fact-recall'"),
        (["--task", "icl", "--preset", "learnable", "--tokenizer-type", "ByteLevelTokenizer"], "leave it out"),
        (["--task", "icl", "--preset", "learnable", "--tokenizer-model", "x"], "--tokenizer-model is x; leave it out"),
        (["--task", "key-value", "--preset", "learnable", "--lengths", "3000"], "expected at most 256"),
        (["--task", "sums"], "'sums'"),
        (["--task", "icl", "--curriculum", "1.5"], "--curriculum is 1.5; expected a share"),
        (["--task", "icl,fact-recall", "--curriculum", "0.5"], "--task holds 'fact-recall', whose documents"),
        (["--task", "icl", "--lengths", "x"], "--lengths"),
        (["--task", "icl", "--documents", "0"], "--documents"),
        (["--task", "fact-recall", "--facts-per-frequency", "10"], "--facts-per-frequency"),
        (
            ["--task", "fact-recall", "--facts-per-frequency", "64000"],
            "--facts-per-frequency is 64000; expected at most 32000",
        ),
        (
            ["--task", "icl", "--difficulty", "2000"],
            "ask for 4000 different words of 2 syllables; expected at most 3200",
        ),
    ):
        refused = tmp_path / "refused.jsonl"
        code, _, errors = call(monkeypatch, capsys, "make_tasks.py", *arguments, "--output", str(refused))
        assert code == 2 and words in errors and len(errors.splitlines()) == 1
        assert not list(tmp_path.glob("refused*"))
