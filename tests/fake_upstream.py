"""A server of adapters that echoes what it is asked, as an ASGI application; a router that does as it is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from mediator_cli.errors import BundleError, Problem
from mediator_cli.serve.router.decide import Decision

ADAPTERS = ("expert-a", "expert-b")


@dataclass
class StubRouter:
    """A router to which a prompt says its own mixture: `a`, `a=0.6,b=0.4`, all else is dense."""

    models: ClassVar[dict[str, str]] = {"a": "expert-a", "b": "expert-b"}
    dense: str = "dense"
    folder: Path = Path("router")
    record: Any = field(default_factory=lambda: SimpleNamespace(features="text"))

    def decide_text(self, text: str) -> Decision:
        if text == "too long":
            raise BundleError(Problem("prompt 1", "is too long"))
        parts = [part.partition("=") for part in text.split(",")]
        weights = {name: float(weight or 1) for name, _, weight in parts if name in self.models}
        return Decision(weights, {}, 0.25, 0.0)

    def decide_chat(self, messages: list[dict[str, str]]) -> Decision:
        turns = [message["content"] for message in messages if message["role"] == "user"]
        return self.decide_text(turns[-1] if turns else "")

    def decide_ids(self, ids: list[int]) -> Decision:
        return self.decide_text({1: "a", 2: "b"}.get(ids[-1], ""))


@dataclass
class FakeUpstream:
    """Answers with the model and body that it was asked; `pause` seconds lie between the parts of a stream."""

    refuses_to_load: bool = False
    llama: list[dict[str, Any]] = field(default_factory=list)
    pause: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    unloads: list[dict[str, Any]] = field(default_factory=list)
    adapters: set[str] = field(default_factory=lambda: set(ADAPTERS))
    n_gone: int = 0
    breaks_after: int | None = None

    @staticmethod
    def parts(model: str) -> list[bytes]:
        return [b"data: " + json.dumps({"model": model, "n": n}).encode() + b"\n\n" for n in range(5)] + [
            b"data: [DONE]\n\n"
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (event := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{event['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await self._reply(scope, receive, send)

    async def _reply(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (event := await receive())["type"] == "http.request":
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"] == "/v1/models":
            names = ["dense", *sorted(self.adapters)]
            await self._json(send, 200, {"object": "list", "data": [{"id": n, "max_model_len": 512} for n in names]})
        elif scope["path"] == "/lora-adapters":
            await self._json(send, 200, self.llama)
        elif scope["path"] == "/health":
            await self._json(send, 200, {})
        elif scope["path"].endswith("lora_adapter"):
            await self._adapter(scope, send, json.loads(body))
        else:
            await self._answer(body, receive, send)

    async def _adapter(self, scope: Any, send: Any, body: dict[str, Any]) -> None:
        self.keys.append(self.headers[-1].get("authorization", ""))
        name = body["lora_name"]
        await asyncio.sleep(0.001)
        if self.refuses_to_load:
            await self._json(send, 404, {"detail": "Not Found"})
        elif "unload" in scope["path"]:
            self.unloads.append(body)
            self.adapters.discard(name)
            await self._json(send, 200, "ok")
        else:
            weights = (Path(body["lora_path"]) / "adapter_model.safetensors").read_bytes()
            self.loads.append({**body, "digest": hashlib.sha256(weights).hexdigest()})
            self.adapters.add(name)
            await self._json(send, 200, "ok")

    async def _answer(self, raw: bytes, receive: Any, send: Any) -> None:
        self.raw.append(raw)
        try:
            body = json.loads(raw)
            model = body["model"]
        except (ValueError, TypeError, KeyError):
            await self._json(send, 400, {"error": {"message": "bad body"}})
            return
        self.bodies.append(body)
        if isinstance(model, list):
            await self._json(send, 400, {"error": {"message": "bad model"}})
        elif str(model).startswith("mixture-") and model not in self.adapters:
            await self._json(send, 404, {"error": {"message": f"no model {model}"}})
        elif body.get("stream"):
            await self._stream(model, receive, send)
        else:
            await self._json(send, 200, {"model": model, "body": body})

    async def _stream(self, model: str, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(start)
        gone = asyncio.ensure_future(receive())
        try:
            for at, part in enumerate(self.parts(model)):
                if self.breaks_after == at:
                    return
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.wait([gone], timeout=self.pause)
                if gone.done() and self.pause:
                    self.n_gone += 1
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()

    @staticmethod
    async def _json(send: Any, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def call(app: Any, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], list[bytes]]:
    """Ask an application without a network; give status, headers and the parts of the answer as they were sent."""
    head: list[Any] = []
    parts: list[bytes] = []
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return events.pop() if events else await asyncio.sleep(3600)

    async def send(event: Any) -> None:
        if event["type"] == "http.response.start":
            head.append(event)
        elif event.get("body"):
            parts.append(event["body"])

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return head[0]["status"], {name.decode(): value.decode() for name, value in head[0]["headers"]}, parts


def made_adapters(folder: Path, ranks: tuple[int, int] = (2, 2), seed: int = 0) -> Path:
    """Write two small adapters, of which the second has no factors for one module."""
    rng = np.random.default_rng(seed)
    shapes = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.up_proj": (12, 8)}
    for at, (name, rank) in enumerate(zip(ADAPTERS, ranks, strict=True)):
        tensors: dict[str, Any] = {}
        for module, (n_out, n_in) in list(shapes.items())[at:]:
            tensors[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(rank, n_in)).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(n_out, rank)).astype(np.float32)
        place = folder / "adapters" / name
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": ["q_proj"]}
        (place / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapters"
