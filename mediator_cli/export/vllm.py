"""A folder that vLLM serves: dense model, an adapter for each expert, the router, and the command line for them."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ConfigDict

from mediator_cli.errors import OutputError
from mediator_cli.export.dense import write_dense
from mediator_cli.export.folder import CARD, building, folder_bytes, open_for_export, write_report
from mediator_cli.export.lora import check_lora, safe_rank, write_lora
from mediator_cli.export.report import AdapterReport
from mediator_cli.export.router import DENSE, RouterReport, checked_router, write_router_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.export.lora import LoraJob
    from mediator_cli.export.settings import Run

SCRIPT, RAY, KSERVE = "serve.sh", "serve_config.yaml", "llmisvc.yaml"
ADAPTERS, ROUTER = "adapters", "router"
MIDDLEWARE = "mediator_cli.serve.router.RouterMiddleware"
MOST_BUILT = 16
"""Mixtures that a server holds beside the experts, where they are built on demand."""
_MOST_IN_A_BATCH = 8


class VllmReport(BaseModel):
    """What was written; `grid_rank` is the rank of a mixture of two experts, None where vLLM takes none so large."""

    model_config = ConfigDict(frozen=True)

    format: str = "vllm"
    folder: str
    bundle: str
    dense_bytes: int
    adapters: AdapterReport
    router: RouterReport
    rank: int
    grid_rank: int | None
    bytes: int
    notices: tuple[str, ...] = ()


def export_vllm(folder: Path, target: Path, job: LoraJob, run: Run) -> VllmReport:
    """Write what `sh serve.sh` serves: all appears together or not at all.

    Raises BundleError where the bundle has no experts that adapters can carry, or no router that can leave it.
    """
    bundle = open_for_export(folder)
    record = checked_router(bundle)
    whole = replace(job, experts=(), base_name=DENSE)
    check_lora(bundle, whole)
    with building(target, run, f"vllm {whole!r} {bundle.manifest.digest}") as place:
        parts = [place / name for name in (DENSE, ADAPTERS, ROUTER)]
        for part in parts:
            part.mkdir()
        dense = write_dense(bundle, parts[0], {}, run)
        adapters = write_lora(bundle, parts[1], whole, run)
        router = write_router_folder(bundle, record, parts[2])
        _write_texts(place, record.experts, adapters.rank)
        report = VllmReport(
            folder=str(target.absolute()),
            bundle=bundle.manifest.digest,
            dense_bytes=dense.bytes,
            adapters=adapters,
            router=router,
            rank=adapters.rank,
            grid_rank=grid_rank(adapters.rank),
            bytes=folder_bytes(place),
            notices=tuple(dict.fromkeys((*adapters.notices, *router.notices))),
        )
        write_report(place, report)
    return report


def grid_rank(rank: int) -> int | None:
    """Give the rank that mixtures of two adapters of a rank need; None where vLLM takes none so large."""
    try:
        return safe_rank(2 * rank)
    except OutputError:
        return None


def _write_texts(place: Path, experts: Sequence[str], rank: int) -> None:
    texts: Mapping[str, str] = {
        SCRIPT: serve_script(experts, rank),
        CARD: _card(experts),
        RAY: _yaml(_RAY_HEAD, ray_config(experts, rank)),
        KSERVE: _yaml(_KSERVE_HEAD, kserve_config(experts, rank)),
    }
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / SCRIPT).chmod(0o755)


def serve_script(experts: Sequence[str], rank: int) -> str:
    """Write the command line of vLLM, its numbers of the adapters' true rank, and our router inside."""
    modules = [json.dumps({"name": name, "path": f"{ADAPTERS}/{name}", "base_model_name": DENSE}) for name in experts]
    loras = " ".join(shlex.quote(module) for module in modules)
    return _SCRIPT.format(
        rank=rank,
        n=len(experts),
        in_a_batch=min(len(experts), _MOST_IN_A_BATCH),
        grid=_GRID.format(rank=grid_rank(rank), n=len(experts) + MOST_BUILT) if grid_rank(rank) else _NO_GRID,
        loras=loras,
        middleware=MIDDLEWARE,
        dense=DENSE,
        router=ROUTER,
    )


_SCRIPT = """\
#!/bin/sh
# Serves the dense model, the experts as adapters, and mediator's router as the model `auto`. It needs vllm and
# mediator-merge in one environment; more options of `vllm serve` can follow, such as --port 8001.
#   MEDIATOR_MIXTURES=grid sh serve.sh     two experts may answer together, in steps of a quarter
#   MEDIATOR_ROUTER= sh serve.sh           without the router inside, for `mediator serve --upstream`
set -eu
cd -- "$(dirname -- "$0")"
rank={rank} held={n}
{grid}
if [ -n "${{MEDIATOR_ROUTER={router}}}" ]; then
  export MEDIATOR_ROUTER
  set -- --middleware {middleware} "$@"
fi
exec vllm serve {dense} --served-model-name {dense} --host 127.0.0.1 \\
  --enable-lora --max-lora-rank "$rank" --max-loras {in_a_batch} --max-cpu-loras "$held" \\
  --lora-modules {loras} \\
  "$@"
"""
_GRID = """\
if [ "${{MEDIATOR_MIXTURES:-top1}}" = grid ]; then
  # The router inside lets nobody else load adapters; without it, keep this server on loopback or behind --api-key.
  rank={rank} held={n}
  export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
fi"""
_NO_GRID = """\
if [ "${MEDIATOR_MIXTURES:-top1}" = grid ]; then
  echo "two of these adapters together have a larger rank than vLLM takes; export with a smaller --rank" >&2
  exit 2
fi"""


def ray_config(experts: Sequence[str], rank: int) -> dict[str, object]:
    """Give the configuration of two replicas in Ray Serve LLM; it calls the adapters dense:NAME."""
    engine = {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": min(len(experts), _MOST_IN_A_BATCH),
    }
    model = {
        "model_loading_config": {"model_id": DENSE, "model_source": f"s3://BUCKET/{DENSE}"},
        "lora_config": {
            "dynamic_lora_loading_path": f"s3://BUCKET/{ADAPTERS}",
            "max_num_adapters_per_replica": len(experts),
        },
        "engine_kwargs": engine,
        "deployment_config": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}},
    }
    application = {
        "name": "mediator",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [application]}


def kserve_config(experts: Sequence[str], rank: int) -> dict[str, object]:
    """Give an LLMInferenceService of two replicas."""
    adapters = [{"name": name, "uri": f"s3://BUCKET/{ADAPTERS}/{name}"} for name in experts]
    numbers = f"--max-lora-rank {rank} --max-loras {min(len(experts), _MOST_IN_A_BATCH)}"
    container = {"name": "main", "env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": numbers}]}
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": "mediator"},
        "spec": {
            "model": {"uri": f"s3://BUCKET/{DENSE}", "name": DENSE, "lora": {"adapters": adapters}},
            "replicas": 2,
            "router": {"route": {}, "gateway": {}, "scheduler": {}},
            "template": {"containers": [container]},
        },
    }


_RAY_HEAD = """\
# Two replicas in Ray Serve LLM: put dense/ and adapters/ into a bucket, write its name below, `serve run` this.
# The router stands before it: mediator serve router --upstream http://127.0.0.1:8000 --upstream-models 'dense:{expert}'
"""
_KSERVE_HEAD = """\
# Two replicas on Kubernetes by KServe: put dense/ and adapters/ into a bucket, write its name below, apply.
# The router stands before the gateway: mediator serve router --upstream http://GATEWAY
"""


def _yaml(head: str, data: object) -> str:
    return head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _card(experts: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in experts)
    return _CARD.format(names=names, first=experts[0], script=SCRIPT, ray=RAY, kserve=KSERVE, middleware=MIDDLEWARE)


_CARD = """\
# A bundle for vLLM

`dense/` is the dense model, `adapters/` has a LoRA adapter for each expert ({names}), `router/` decides between them.
`export.json` tells how much of each expert its adapter holds.

## Three ways to serve it

1. **The router inside vLLM.** With vllm and mediator-merge in one environment, `sh {script}`. Clients ask for the model
   `auto`, or for an expert by its name, or for `dense`:

   ```bash
   curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
     -d '{{"model": "auto", "messages": [{{"role": "user", "content": "Hello"}}]}}'
   ```

   The headers `x-mediator-mixture` and `x-mediator-uncertainty` tell who answered and how unsure the router was.
2. **The router before vLLM**, in an environment of its own, without torch: `MEDIATOR_ROUTER= sh {script}`, and
   `mediator serve router --upstream http://127.0.0.1:8000 --port 8080`.
3. **Replicas.** `{ray}` is for Ray Serve LLM, `{kserve}` for KServe; the router stands before them as in 2.

An input of which the router is sure is answered by one expert, all others by the dense model. With
`MEDIATOR_MIXTURES=grid` two experts answer together in steps of a quarter: adapters of such mixtures are built from
`adapters/` and loaded while the server runs.
"""
