"""tools/serve.py with OpenAI's own client: answers, streams, refusals, limits and the end of the server."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "functional"))

from conversions import edit_json, forked, rewrite, saved, to_hf  # noqa: E402
from serving_process import LACKING, Server, serving  # noqa: E402

pytestmark = pytest.mark.thorough

served_only = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)} (requirements-serve.txt)")

CONTEXT = 4096
TEMPLATE = (
    "{% for message in messages %}{% if message.content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
)
END = 256  # the byte-level tokenizer's end-of-document token
ON = {str(END): -100}  # a text that goes on


def made(folder: Path, **changes: Any) -> Path:
    run = saved(folder, tokenizer_type="ByteLevelTokenizer", vocab_size=257, iters=1, **changes)
    return forked(to_hf, run, folder / "model")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """Rotary positions, so that its context can be made long enough for a generation of minutes; with a template."""
    path = made(tmp_path_factory.mktemp("rope"))
    edit_json(path / "config.json", lambda config: config.update(max_position_embeddings=CONTEXT))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """Learned positions for 32 tokens, and no template."""
    return made(tmp_path_factory.mktemp("learned"), position_embedding_type="learned_absolute")


@pytest.fixture(scope="module")
def server(export, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(export, log, "--memory-tables", "mmap", "--max-request-bytes", "20000") as running:
        yield running


@pytest.fixture(scope="module")
def small(learned, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("small") / "log"
    names = ["--served-model-name", "first", "--served-model-name", "second/name"]
    with serving(learned, log, *names) as running:
        yield running


def greedy(export: str, prompt: str, count: int) -> str:
    """What transformers' own loop generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import umv2_megatron.hf  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def complete(server: Server, **options: Any) -> Any:
    """An answer that no end-of-document token ends, unless ``options`` has another ``logit_bias``."""
    body = {"model": "model", "prompt": "def x", "max_tokens": 8, "logit_bias": ON, **options}
    return server.client().completions.create(**body)


def text(server: Server, **options: Any) -> str:
    return complete(server, **options).choices[0].text


class Raw:
    """One connection that is kept, to see what a client library does not show."""

    def __init__(self, server: Server) -> None:
        self.connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
        self.connection.connect()
        self.socket = self.connection.sock

    def send(self, body: Any, path: str = "/v1/completions", method: str = "POST", **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer; the same connection must have brought it."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        self.connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        answer = self.connection.getresponse()
        content = json.loads(answer.read())
        assert self.connection.sock is self.socket, "the server closed the connection"
        return answer.status, content


@pytest.mark.slow
@served_only
def test_temperature_and_seed_decide(server, export):
    assert text(server, temperature=0, max_tokens=24, logit_bias=None) == forked(greedy, str(export), "def x", 24)
    hot = [text(server, temperature=2, seed=seed) for seed in range(4)]
    assert len(set(hot)) == 4
    assert text(server, temperature=2, seed=3) == hot[3] and text(server, temperature=2) != text(server, temperature=2)
    assert text(server, temperature=2, top_p=0, seed=5) == text(server, temperature=0)
    several = complete(server, prompt=["def x", "class"], n=2, seed=1, temperature=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == hot[1:3]
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (10, 32)


@served_only
def test_every_form_of_prompt_and_the_end_of_a_text(server):
    expected = text(server, temperature=0)
    for prompt in (["def x"], list(b"def x"), [list(b"def x")]):
        assert text(server, prompt=prompt, temperature=0) == expected
    default = complete(server, max_tokens=None)
    assert default.choices[0].finish_reason == "length" and default.usage.completion_tokens == 16
    ended = complete(server, logit_bias={str(END): 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    letters = {str(letter): 100 for letter in b"ab"}
    free = text(server, seed=1, max_tokens=40, logit_bias=letters)
    assert set(free) == {"a", "b"}
    for options in ({}, {"stream": True}):
        answer = complete(server, seed=1, max_tokens=40, logit_bias=letters, stop=["zz", "ba"], **options)
        choices = [chunk.choices[0] for chunk in answer] if options else answer.choices
        assert "".join(choice.text for choice in choices) == free[: free.index("ba")]
        assert choices[-1].finish_reason == "stop"
    unlike = text(server, temperature=0, max_tokens=5, frequency_penalty=2, presence_penalty=2, logit_bias={"97": 4})
    assert unlike.count("a") < 5


@served_only
def test_streams_give_the_same_text_and_usage(server):
    options = {"temperature": 0, "max_tokens": 30, "echo": True}
    whole = complete(server, **options)
    chunks = list(complete(server, **options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert whole.choices[0].text.startswith("def x") and len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "length" and not chunks[-1].choices
    assert chunks[-1].usage == whole.usage and chunks[0].usage is None
    assert all(chunk.usage is None for chunk in complete(server, stream=True))


@served_only
def test_log_probabilities(server):
    scored = complete(server, echo=True, logprobs=3, temperature=0, max_tokens=4, logit_bias={"97": 100}).choices[0]
    found = scored.logprobs
    assert "".join(found.tokens) == scored.text == "def xaaaa" and found.text_offset == list(range(9))
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    # what is generated has the log-probability that the same text has as a prompt
    again = complete(server, prompt=scored.text, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert again.text == scored.text and again.finish_reason == "length"
    assert again.logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[1:], abs=1e-4)
    for options in ({"stream": True}, {}):
        messages = [{"role": "user", "content": "hi"}]
        wanted = {"max_tokens": 3, "logprobs": True, "top_logprobs": 2, "logit_bias": {"97": 100}, **options}
        answer = server.client().chat.completions.create(model="model", messages=messages, **wanted)
        choices = [chunk.choices[0] for chunk in answer] if options else answer.choices
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert [(entry.token, entry.bytes, len(entry.top_logprobs)) for entry in entries] == [("a", [97], 2)] * 3


@served_only
def test_chat(server):
    create = server.client().chat.completions.create
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    options: dict[str, Any] = {"model": "model", "messages": messages, "temperature": 0, "logit_bias": ON}
    whole = create(**options, max_completion_tokens=12)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content == text(
        server, prompt="<system>be brief<user>hi<assistant>", temperature=0, max_tokens=12
    )
    chunks = list(create(**options, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == whole.usage
    # without a limit, to the end of the context
    to_the_end = [{"role": "user", "content": "x" * (CONTEXT - 30)}]
    long = create(model="model", messages=to_the_end, logit_bias={"97": 100})
    assert long.choices[0].finish_reason == "length" and long.usage.total_tokens == CONTEXT


@served_only
def test_fifty_requests_at_once(server):
    client = server.client()

    def ask(number: int) -> str:
        options = {"model": "model", "prompt": f"{number}", "temperature": 2, "seed": number, "max_tokens": 12,
                   "logit_bias": ON}  # fmt: skip
        if number % 2:
            return client.completions.create(**options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))

    with concurrent.futures.ThreadPoolExecutor(50) as threads:
        together = list(threads.map(ask, range(50)))
    assert [ask(number) for number in (0, 7, 20, 49)] == [together[number] for number in (0, 7, 20, 49)]
    assert len(set(together)) == 50


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    *(({"max_tokens": value}, "max_tokens") for value in (0, -1, "x", 1.5, True, 10**20, [3])),
    *(({"temperature": value}, "temperature") for value in (-1, 2.1, "1", True)),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"seed": 2**64}, "seed"),
    *(({"stop": value}, "stop") for value in (["a"] * 5, "", 3)),
    *(({"logprobs": value}, "logprobs") for value in (6, True)),
    ({"echo": "yes"}, "echo"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"top_k": 5}, "top_k"),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
]
WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "name"),
    ({"messages": [{"role": "user", "content": "bad"}]}, "messages"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
]


@served_only
def test_what_is_wrong_is_refused_and_the_connection_stays(server):
    raw = Raw(server)
    chat = {"model": "model", "messages": [{"role": "user", "content": "hi"}]}
    cases = [("/v1/completions", {"model": "model", "prompt": "x", **change}, param) for change, param in WRONG]
    cases += [("/v1/chat/completions", {**chat, **change}, param) for change, param in WRONG_CHATS]
    for path, body, param in cases:
        status, answer = raw.send(body, path)
        assert status == 400 and answer["error"]["param"] == param, (body, answer)
        assert answer["error"]["type"] == "invalid_request_error" and set(answer["error"]) == {
            "message", "type", "param", "code"}  # fmt: skip
    numbers = (b'{"temperature": NaN}', b'{"seed": 1' + b"0" * 9000)
    for data in (b"", b"{", b"\xff", b"[1]", b"null", b"[" * 9000, *numbers):
        status, answer = raw.send(data)
        assert status == 400 and "JSON" in answer["error"]["message"]
    assert raw.send({}, **{"Content-Type": "text/plain"})[0] == 400
    assert raw.send(None, "/v1/engines", "GET") == (404, {"error": {"code": "unknown_url", "param": None,
        "message": "GET '/v1/engines' is no request of this server", "type": "invalid_request_error"}})  # fmt: skip
    assert raw.send(None, method="GET")[0] == 405
    status, answer = raw.send({"model": "gpt-4", "prompt": "x"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    for large in (b'{"prompt": "' + b"x" * 20_000 + b'"}', b"x" * 3_000_000):
        status, answer = raw.send(large)
        assert status == 413 and answer["error"]["code"] == "request_too_large"
    neutral = {"suffix": "", "best_of": 1, "user": "me", "stop": None, "top_p": None, "n": 1, "logit_bias": ON}
    status, answer = raw.send({"model": "model", "prompt": "x", "max_tokens": 2, **neutral})
    assert status == 200 and answer["usage"]["total_tokens"] == 3


@served_only
def test_a_body_in_chunks_is_limited_too(server):
    raw = Raw(server)
    parts = iter([b'{"model": "model", "prompt": "x", "max_tokens": 1', b"}"])
    raw.connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert json.loads(raw.connection.getresponse().read())["usage"]["total_tokens"] == 2
    parts = iter([b"x" * 1000] * 40)
    raw.connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert raw.connection.getresponse().status == 413


@served_only
def test_the_context_ends(server, small):
    for which, context in ((server, CONTEXT), (small, 32)):
        full = complete(which, prompt="x" * (context - 3), max_tokens=3, logit_bias={"97": 100})
        assert full.usage.total_tokens == context and full.choices[0].finish_reason == "length"
        raw = Raw(which)
        for prompt, tokens in (("x" * (context - 2), 3), ("x" * context, 1), ("x" * context, None), ("x" * 5000, 1),
                               ("x", context + 1)):  # fmt: skip
            status, answer = raw.send({"model": "model", "prompt": prompt, "max_tokens": tokens})
            assert status == 400 and answer["error"]["code"] == "context_length_exceeded", answer
        # the default number of tokens ends with the context
        assert complete(which, prompt="x" * (context - 3), max_tokens=None, seed=1).usage.total_tokens == context


@served_only
def test_names_of_the_model(server, small, export, learned):
    for which, path, listed in ((server, export, str(export)), (small, learned, "first")):
        models = which.client().models
        assert [model.id for model in models.list().data] == [listed]
        near = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        for name in (str(path), f"{path}/", near, path.name, listed):
            assert models.retrieve(name).id == listed
            assert complete(which, model=name, max_tokens=1).model == listed
    assert small.client().models.retrieve("second/name").id == "first"
    raw = Raw(server)
    for name in ("first", "", "models", f"{export}x", "\x00"):
        assert raw.send({"model": name, "prompt": "x"})[0] == 404
    assert raw.send(None, "/v1/models/first", "GET")[0] == 404
    assert raw.send(None, "/health", "GET") == (200, {"status": "ok"})
    status, answer = Raw(small).send({"model": "first", "messages": [{"role": "user", "content": "hi"}]},
                                     "/v1/chat/completions")  # fmt: skip
    assert status == 400 and "no chat template" in answer["error"]["message"]


LONG = {"model": "model", "prompt": "x", "max_tokens": CONTEXT - 1, "logit_bias": {"97": 100}}
"""Takes many seconds."""


@served_only
def test_places_are_limited_and_free_when_clients_leave(export, tmp_path):
    with serving(export, tmp_path / "log", "--max-concurrent", "2") as server:
        client = server.client()
        streams = [client.completions.create(**LONG, stream=True) for _ in range(2)]
        for stream in streams:
            assert next(iter(stream)).choices[0].text == "a"
        raw = Raw(server)
        status, answer = raw.send({"model": "model", "prompt": "x"})
        assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
        streams[0].close()  # a stream that is left
        deadline = time.monotonic() + 20
        while (status := raw.send({"model": "model", "prompt": "x", "max_tokens": 1})[0]) == 429:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert status == 200
        whole = Raw(server)  # and an answer that is not waited for
        whole.connection.request("POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"})
        while raw.send({"model": "model", "prompt": "x", "max_tokens": 1})[0] == 200:
            assert time.monotonic() < deadline
        whole.connection.close()
        while raw.send({"model": "model", "prompt": "x", "max_tokens": 1})[0] == 429:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        code, seconds = server.end(signal.SIGINT)
        assert code == 130 and seconds < 5


@served_only
def test_sigterm_ends_long_generations_in_time(export, tmp_path):
    with serving(export, tmp_path / "log") as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        raw = Raw(server)
        waiting = threads.submit(raw.send, LONG)
        stream = iter(server.client().completions.create(**LONG, stream=True))
        next(stream)
        code, seconds = server.end()
        assert code == 0 and seconds < 5
        status, answer = waiting.result(10)
        assert status == 503 and answer["error"]["code"] == "server_shutting_down"
        with pytest.raises(Exception, match="shutting down"):
            list(stream)
        assert "Traceback" not in (tmp_path / "log").read_text()


@served_only
def test_the_program_itself_is_ready_and_ends(learned, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), learned.name, "--port", "0", "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=learned.parent, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()  # the time limit of the test ends a program that says nothing
        assert line.startswith(f"serving {learned.name} at http://127.0.0.1:"), (tmp_path / "log").read_text()
        port = urllib.parse.urlsplit(line.split()[-1]).port
        assert f"--port is {port}" in forked(refused, [str(learned), "--port", str(port)])
        server.terminate()
        assert server.wait(5) == 0
    finally:
        server.kill()
        server.wait()


def refused(argv: list[str]) -> str:
    """The one sentence with which the program refuses a command line that it can parse."""
    from umv2_megatron.commands import serve

    try:
        serve.main(serve.parser().parse_args(argv))
    except ValueError as error:
        return str(error)
    return "not refused"


MISSING = "model.layers.1.mlp.down_proj.weight"


def test_what_cannot_be_served_is_refused_in_one_sentence(export, tmp_path):
    lacking, other, mute = (shutil.copytree(export, tmp_path / name) for name in ("lacking", "other", "mute"))
    rewrite(lacking / "model.safetensors", lambda tensors: tensors.pop(MISSING))
    edit_json(other / "config.json", lambda config: config.update(model_type="llama"))
    for path in mute.glob("tokenizer*"):
        path.unlink()
    cases = [
        ([str(export.parent / "run" / "iter_0000001")], "no export"),
        ([str(tmp_path)], "no export"),
        ([str(other), "--memory-tables", "mmap"], "--memory-tables is mmap"),
        ([str(mute)], "no tokenizer"),
        ([str(export), "--port", "65536"], "--port is 65536"),
        ([str(export), "--max-concurrent", "0"], "--max-concurrent is 0"),
        ([str(export), "--max-request-bytes", "1"], "--max-request-bytes is 1"),
        ([str(export), "--served-model-name", ""], "--served-model-name"),
    ]
    if not LACKING:
        cases += [
            ([str(lacking), "--port", "0"], MISSING),
            ([str(export), "--port", "0", "--device", "toaster"], "--device is toaster"),
            ([str(export), "--port", "0", "--host", "192.0.2.1"], "--host is '192.0.2.1'"),
        ]
    for argv, word in cases:
        message = forked(refused, argv)
        assert word in message and "\n" not in message, argv
    command = [sys.executable, "tools/serve.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
