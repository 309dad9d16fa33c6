"""Serve packed models over HTTP: OpenAI's interface under /v1, a chat page at /.

Without MODEL, the model in the box. Any OpenAI client works with http://127.0.0.1:8080/v1 as its
base URL; /metrics is for Prometheus, /health and /ready are for whoever runs it. Earlier states of
conversations are kept (--state-cache), so a further turn computes its new words only, and with
--state-dir they outlive the process.

Who listens beyond this machine (--host 0.0.0.0) should ask for keys (--api-key), and have a proxy
in front that speaks TLS.

SIGTERM, SIGINT (Ctrl-C) or SIGHUP end it in order: no new work, answers end or are cut after
--grace seconds, the cache is written, exit status 0. A second signal ends it at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul.cli.options import byte_count, kv_option, option
from nomatmul.cli.show import json_text, size

EXAMPLES = """
examples:
  nomatmul serve                                   the model in the box, on 127.0.0.1:8080
  nomatmul serve my-model-packed --port 9000
  nomatmul serve chat=my-model-packed embed=my-encoder-packed
  nomatmul serve nomatmul-box nomatmul-box-encoder         both models of the box, by their names
  nomatmul serve my-model-packed --state-dir ~/states --state-cache 4GiB
  nomatmul serve --host 0.0.0.0 --api-key keys.txt --log requests
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
       -d '{"model": "nomatmul-box", "prompt": "The river", "max_tokens": 20}'

environment: NOMATMUL_API_KEY is a key beside those of --api-key.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    models: tuple[str, ...] = option(
        (),
        positional=True,
        metavar="MODEL",
        help="packed model directory or hf:owner/name, or NAME=one of these (default: the box)",
    )
    host: str = option("127.0.0.1", metavar="HOST", help="address or name to listen on")
    port: int = option(8080, metavar="N", help="port to listen on; 0 takes a free one and says so")
    threads: int | None = option(None, metavar="N", help="threads (default: one a core)")
    device: str = option("cpu", metavar="DEVICE", help="cpu, or a GPU: cuda, cuda:1")
    kv: str = kv_option()
    max_streams: int = option(16, metavar="N", help="answers that are written at once")
    max_queue: int = option(64, metavar="N", help="requests that may wait; beyond: status 429")
    state_cache: int = option(
        1 << 30, metavar="SIZE", type=byte_count, help="memory for earlier states; 0 keeps none"
    )
    state_dir: str | None = option(
        None, metavar="DIR", help="keep states on disk, for the next start"
    )
    api_key: str | None = option(
        None, metavar="FILE", help="requests need one of the keys in this file, one a line"
    )
    timeout: float = option(600.0, metavar="S", help="seconds that a request may take")
    grace: float = option(30.0, metavar="S", help="seconds for answers to end after a signal")
    max_body: int = option(
        16 << 20, metavar="SIZE", type=byte_count, help="the largest body; beyond: status 413"
    )
    max_connections: int = option(512, metavar="N", help="connections; beyond: status 503")
    cors: tuple[str, ...] = option(
        (), metavar="ORIGIN", help="pages that may read answers, * for all; may be repeated"
    )
    allow_host: tuple[str, ...] = option(
        (),
        metavar="NAME",
        help="further name of this server in the Host header, where it listens on a loopback"
        " address without keys; may be repeated",
    )
    chat_template: str | None = option(
        None, metavar="FILE", help="Jinja template in place of the model's own, or plain"
    )
    log: str = option(
        "none", choices=("none", "requests"), help="a line for each request, without its texts"
    )
    replicas: int = option(
        1, metavar="N", help="whole servers behind one address, by Ray Serve (extra serve-ray)"
    )
    json: bool = option(False, help="say what runs where as one JSON object on one line")


def run(options: Options) -> int:
    from nomatmul.cli.sampling import before_numpy

    before_numpy()
    from nomatmul.serve.keys import find_keys
    from nomatmul.serve.options import ServeOptions
    from nomatmul.serve.run import configure_log, serve

    keys = find_keys(None if options.api_key is None else Path(options.api_key))
    names = {field.name for field in dataclasses.fields(ServeOptions)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.state_dir is not None:
        given["state_dir"] = Path(options.state_dir).expanduser()
    chosen = ServeOptions(**given, api_keys=keys)
    configure_log(chosen)

    def show(report: dict[str, Any]) -> None:
        text = json_text(report) if options.json else "\n".join(_lines(report))
        print(text, flush=True)

    if options.replicas != 1:
        from nomatmul.serve.replicas import serve_replicas

        return serve_replicas(chosen, options.replicas, show)
    return serve(chosen, show)


def _lines(report: dict[str, Any]) -> list[str]:
    """The report of a server that is ready, as people read it."""
    cache, limits = report["state_cache"], report["limits"]
    kept = f"kept in {cache['directory']}" if cache["directory"] else "not kept on disk"
    rows = [("page", report["page"]), ("API", f"{report['api']}  (metrics: {report['metrics']})")]
    rows += [(f"model {model['name']}", _model(model)) for model in report["models"]]
    if replicas := report.get("replicas"):
        rows.append(("replicas", f"{replicas}, each with all of this"))
    rows += [
        ("state cache", f"up to {size(cache['bytes'])}, {kept}" if cache["bytes"] else "off"),
        (
            "limits",
            f"{limits['streams']} streams, {limits['queue']} waiting requests,"
            f" {limits['seconds']:g} s a request, bodies of {size(limits['body_bytes'])}",
        ),
        ("keys", str(report["keys"]) if report["keys"] else "none: --api-key FILE asks for one"),
    ]
    if report["open_to_all"]:
        rows.append(("WARNING", "everybody who reaches this address may use the models"))
    width = max(len(name) for name, _ in rows)
    text = [f"{name:{width}}  {words}" for name, words in rows]
    return [*text, f"ready after {report['ready_s']:.2f} s; Ctrl-C ends it"]


def _model(model: dict[str, Any]) -> str:
    words = [f"{model['parameters']:,} parameters"]
    if model["packing"] != "none":
        words.append(f"{model['packing']} weights")
    cpu = model["device"] == "cpu"
    threads = f"{model['threads']} thread{'s' if model['threads'] != 1 else ''}"
    where = f"on {threads if cpu else model['device']}"
    words += [
        f"{model['kernels']} kernels {where}",
        f"{size(model['weight_bytes'])} of weights",
    ]
    if model["kind"] == "encoder":
        return ", ".join([*words, "an encoder, for embeddings"])
    each = [f"{size(model['stream_bytes'])} a stream"] if model["stream_bytes"] else []
    each += [f"{size(model['token_bytes'])} a token of a stream"] if model["token_bytes"] else []
    template = {"model": "its own chat template", "plain": "the plain chat template"}
    return ", ".join([*words, *each, template[model["chat_template"]]])
