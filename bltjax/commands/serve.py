"""Serves a model over HTTP as OpenAI's clients ask for it: `bltjax serve --checkpoint=DIR`.

Prints the address when it answers, and compiles programs until a request comes; /health is ok once
usual requests need none. SIGTERM or Ctrl-C: answers that are being written are finished,
other requests get 503, then it ends with 0; a second signal ends it at once. The last line is JSON.
Only this machine can reach it, unless --host says otherwise (docs/serving.md).
"""

import ipaddress
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from absl import flags

from bltjax import cli
from bltjax.runtime.terminal import printable_name

FAILED = 1  # exit code: the model failed while it served
KEPT_PREFIXES = 4  # system messages whose caches are kept
KEY = "BLTJAX_API_KEY"  # in the environment, where other users of the machine do not see it


def main(argv):
    cli.no_arguments(argv, "give --checkpoint")
    chosen = flags.FLAGS
    if chosen.checkpoint is None:
        cli.fail("give --checkpoint=DIR")
    try:
        found = run(chosen)
    except (ValueError, KeyError, OSError) as error:
        cli.fail(error)
    print(json.dumps(found))


def run(chosen) -> dict:
    """Serves what the flags name until the server is told to end."""
    cli.model_directories()  # refused before JAX is loaded
    try:
        from bltjax.api import Model  # late: JAX takes seconds
        from bltjax.serving import server
    except ImportError as error:
        raise ValueError(f"serving needs more ({error}): pip install 'bltjax[serve]'") from None
    key = chosen.api_key or os.environ.get(KEY) or None
    root_path, sites = chosen.root_path.strip("/"), origins(chosen.cors)
    with server.bind(chosen.host, chosen.port) as where:  # an address that is taken shows at once
        model = cli.open_model()
        if not isinstance(model, Model):
            raise ValueError("this is a model of tokens: serve a byte latent transformer")
        scheduler = model.scheduler(chosen.rows, chosen.max_length, KEPT_PREFIXES)
        name = chosen.name or Path(chosen.checkpoint).name or "bltjax"
        settings = server.Settings(
            name,
            key,
            chosen.max_body_bytes,
            max_text_bytes=chosen.max_length - 1,
            root_path=root_path and f"/{root_path}",
            origins=sites,
            warm_up=chosen.warm_up,
        )
        host, port = where.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if key is None and not _is_loopback(host):
            print(
                f"note: everyone who reaches {shown} may use the model: give {KEY} a key",
                file=sys.stderr,
            )
        where.listen()  # who reads the address may connect
        print(f"serving {printable_name(name)} at http://{shown}:{port}", flush=True)
        try:
            max_open = chosen.rows + chosen.max_waiting
            return server.serve(model, scheduler, where, settings, max_open)
        except server.ModelFailed as error:
            cli.fail(error, FAILED)


def origins(given: list[str]) -> tuple[str, ...]:
    """Returns the origins of pages. Raises ValueError for what is none."""
    for origin in given:
        url = urlsplit(origin)
        if origin != "*" and origin != f"{url.scheme}://{url.netloc}":
            raise ValueError(f"--cors={origin}: give origins as https://site.example:8080, or *")
    return tuple(given)


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def define_flags():
    cli.define_model_flags()
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all networks.")
    flags.DEFINE_integer("port", 8000, "Port to listen at; 0: any free one.", 0, 65535)
    flags.DEFINE_string("api_key", None, f"Key that requests must send; better: ${KEY}.")
    flags.DEFINE_string("name", None, "Name of the model; default: that of the directory.")
    flags.DEFINE_list("cors", [], "Origins whose pages may ask, as https://site.example; *: all.")
    flags.DEFINE_string("root_path", "", "Prefix of paths behind a proxy, as /blt.")
    flags.DEFINE_bool("warm_up", True, "Compile what usual requests need before they come.")
    flags.DEFINE_integer("rows", 8, "Texts that are written at once.", lower_bound=1)
    flags.DEFINE_integer("max_waiting", 64, "Texts that may wait; more get 429.", lower_bound=0)
    flags.DEFINE_integer("max_body_bytes", 2**22, "Of a request; more get 413.", lower_bound=1)
    flags.DEFINE_integer(
        "max_length", 2**13, "Bytes of a prompt and what is written after it; 2^n is used.", 64
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
