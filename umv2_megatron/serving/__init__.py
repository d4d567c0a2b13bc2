"""The HTTP server of an export with the API of OpenAI: what a request may say, its generation, its answer.

    fields, requests    what a request says, checked; every fault is an ``ApiError``
    choices, released   one choice of an answer, token by token
    engine              the thread that generates, a token for each request in turn
    answers             bodies and events as OpenAI documents them
    app, server         HTTP: routes, limits, sockets, signals

This is not transformers' own server (``transformers serve``, 5.23.0), for three reasons. Its modules are private and
change with every release. It answers what it loads from the hub and has further routes that load any model. And it
has one random state for all requests, no end to a generation whose client has left, and no prompt lists, choices,
echo or log-probabilities. What is used of transformers is the model with its cache and the tokenizer.
"""
