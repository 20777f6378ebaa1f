"""Run prompts (API-format workflows) on a ComfyUI server and follow them as they run."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib import error, parse, request

import aiohttp

Prompt = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Progress:
    """A node got to `step` of `total` (a sampler's steps)."""

    node: str
    step: int
    total: int


@dataclass
class Result:
    """What a prompt did: `images` are file contents by output node, in order."""

    images: dict[str, list[bytes]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)


@dataclass(eq=False)
class PromptError(RuntimeError):
    """A prompt was refused or failed; says in which node and why."""

    node_id: str
    node_class: str
    exception_type: str
    message: str

    def __str__(self) -> str:
        where = f"node {self.node_id} ({self.node_class}): " if self.node_id else ""
        return f"{where}{self.exception_type}: {self.message}"


class PromptInterrupted(PromptError):
    """The prompt was interrupted while that node ran."""


def _refusal(body: Mapping[str, Any]) -> PromptError:
    """Return the first error of a /prompt answer with status 400."""
    for node_id, node in (body.get("node_errors") or {}).items():
        first = (node.get("errors") or [{"message": "invalid"}])[0]
        return PromptError(node_id, node.get("class_type", ""), *_kind_and_message(first))
    top = body.get("error")
    if not isinstance(top, Mapping):
        return PromptError("", "", "invalid_prompt", str(top))
    extra = top.get("extra_info") or {}
    node_id, node_class = str(extra.get("node_id", "")), str(extra.get("class_type", ""))
    return PromptError(node_id, node_class, *_kind_and_message(top))


def _kind_and_message(said: Mapping[str, Any]) -> tuple[str, str]:
    message = f"{said.get('message', '')}: {said.get('details', '')}".strip(": ")
    return str(said.get("type", "")), message


class Client:
    """Talk to the server at `address` (`host:port`)."""

    def __init__(self, address: str, timeout: float = 600.0) -> None:
        """`timeout`: seconds for a whole prompt, and for any single answer."""
        self.address = address
        self.timeout = timeout
        self.id = uuid.uuid4().hex

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        question = request.Request(f"http://{self.address}{path}", data=data, headers=headers)
        direct = request.build_opener(request.ProxyHandler({}))
        with direct.open(question, timeout=self.timeout) as answer:
            return bytes(answer.read())

    def get(self, path: str) -> Any:
        """Return what the server answers to GET `path`, from JSON."""
        return json.loads(self._request(path))

    def object_info(self, node_class: str = "") -> dict[str, Any]:
        """Return the schema of every node, or of one."""
        return dict(self.get(f"/object_info/{node_class}".rstrip("/")))

    def interrupt(self) -> None:
        """Stop the prompt that runs; callable from `on_progress` and other threads."""
        self._request("/interrupt", {})

    def free(self) -> None:
        """Unload all models and forget cached results once the current prompt is done."""
        self._request("/free", {"unload_models": True, "free_memory": True})

    def view(self, image: Mapping[str, str]) -> bytes:
        """Return the file that an output's entry (filename, subfolder, type) names."""
        return self._request(f"/view?{parse.urlencode(image)}")

    def run(self, prompt: Prompt, on_progress: Callable[[Progress], None] | None = None) -> Result:
        """Run `prompt` to its end.

        Raises:
            PromptError: refused by validation, or a node raised; PromptInterrupted likewise.
            TimeoutError: not done within `timeout` seconds; the prompt is interrupted.
        """
        followed = self._follow(prompt, on_progress or (lambda progress: None))
        try:
            result = asyncio.run(asyncio.wait_for(followed, self.timeout))
        except (TimeoutError, asyncio.TimeoutError):
            self.interrupt()
            raise TimeoutError(f"the prompt was not done after {self.timeout:g} s") from None
        for node_id, output in result.outputs.items():
            if "images" in output:
                result.images[node_id] = [self.view(image) for image in output["images"]]
        return result

    def _post(self, prompt: Prompt) -> str:
        try:
            answer = self._request("/prompt", {"prompt": prompt, "client_id": self.id})
        except error.HTTPError as refused:
            if refused.code != 400:
                raise
            raise _refusal(json.loads(refused.read())) from None
        return str(json.loads(answer)["prompt_id"])

    async def _follow(self, prompt: Prompt, on_progress: Callable[[Progress], None]) -> Result:
        address = f"ws://{self.address}/ws?clientId={self.id}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as socket,
        ):
            result, prompt_id = Result(), self._post(prompt)
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue  # previews
                event = json.loads(message.data)
                data = event.get("data") or {}
                if data.get("prompt_id") != prompt_id:
                    continue
                match event["type"]:
                    case "execution_success":
                        return result
                    case "execution_cached":
                        result.cached.extend(map(str, data["nodes"]))
                    case "executing" if data["node"] is not None:
                        result.executed.append(str(data["node"]))
                    case "progress":
                        on_progress(Progress(str(data["node"]), data["value"], data["max"]))
                    case "executed" if data.get("output"):
                        result.outputs[str(data["node"])] = data["output"]
                    case "execution_interrupted" | "execution_error" as kind:
                        raise _failure(kind, data)
        raise ConnectionError(f"the server at {self.address} closed the connection")


def _failure(kind: str, data: Mapping[str, Any]) -> PromptError:
    node_id, node_class = str(data.get("node_id", "")), str(data.get("node_type", ""))
    if kind == "execution_interrupted":
        return PromptInterrupted(node_id, node_class, "InterruptProcessingException", "interrupted")
    message = str(data.get("exception_message", "")).strip()
    return PromptError(node_id, node_class, str(data.get("exception_type", "")), message)
