"""A configuration for vLLM's Semantic Router (vllm-sr 0.4): one route for each expert, by the name of its adapter.

It decides by signals of its own, here by likeness to example prompts, and not by our router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.bundle.manifest import Manifest

SEMANTIC_ROUTER = "semantic-router.yaml"
_LISTENER, _SERVER = 8899, "127.0.0.1:8000"
_THRESHOLD = 0.7
_HEAD = """\
# For vllm-sr 0.4: `vllm-sr config validate --config {file}`, then `vllm-sr serve` (needs Docker or Podman).
# It compares prompts with the candidates below and knows nothing of mediator's router: put five to ten typical prompts
# of each task in place of the names, and see that {server} is where the server with the adapters listens.
"""


def semantic_router_yaml(manifest: Manifest, models: Mapping[str, str], dense: str) -> str:
    """Write a configuration; `models` are the adapters' names on the server by expert, `dense` is what answers else."""
    data = {
        "version": "v0.3",
        "listeners": [{"name": "http", "address": "127.0.0.1", "port": _LISTENER, "timeout": "300s"}],
        "providers": {"defaults": {"model": dense}, "models": [_provider(dense)]},
        "routing": {
            "modelCards": [_card(manifest, models, dense)],
            "signals": {"embeddings": [_signal(expert) for expert in models]},
            "decisions": [*(_decision(*pair, dense) for pair in models.items()), _fallback(dense)],
        },
    }
    head = _HEAD.format(file=SEMANTIC_ROUTER, server=_SERVER)
    return head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _provider(dense: str) -> dict[str, Any]:
    backend = {"name": "server", "endpoint": _SERVER, "protocol": "http", "provider": "vllm", "weight": 100}
    return {"name": dense, "provider_model_id": dense, "api_format": "openai", "backend_refs": [backend]}


def _card(manifest: Manifest, models: Mapping[str, str], dense: str) -> dict[str, Any]:
    loras = [{"name": name, "description": f"the expert {expert}"} for expert, name in models.items()]
    description = f"Dense expert of the bundle {manifest.digest[:16]}."
    return {"name": dense, "description": description, "capabilities": ["chat"], "modality": "ar", "loras": loras}


def _signal(expert: str) -> dict[str, Any]:
    return {"name": expert, "threshold": _THRESHOLD, "aggregation_method": "max", "candidates": [expert]}


def _decision(expert: str, name: str, dense: str) -> dict[str, Any]:
    return {
        "name": expert,
        "description": f"Prompts for the expert {expert}.",
        "priority": 100,
        "rules": {"operator": "AND", "conditions": [{"type": "embedding", "name": expert}]},
        "modelRefs": [{"model": dense, "lora_name": name, "use_reasoning": False}],
    }


def _fallback(dense: str) -> dict[str, Any]:
    return {
        "name": "dense-expert",
        "description": "All other prompts.",
        "priority": 1,
        "rules": {"operator": "AND", "conditions": []},
        "modelRefs": [{"model": dense, "use_reasoning": False}],
    }
