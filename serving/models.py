"""The weights that a server can answer with: one model a stage, loaded when it is first asked for."""

import argparse
import copy
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from common.weights import STAGES, Loaded, load_weights, open_weights
from Config import UserError
from serving.errors import ApiError
from serving.threads import compute_with

BEST_FIRST = ("distill", "SFT_long", "SFT", "pretrain")
DEFAULT = "default"  # as a model's name: the first


@dataclass
class Model:
    """A weights file, loaded or not."""

    name: str
    path: Path
    args: argparse.Namespace  # what open_weights takes
    threads: int  # to compute with
    lock: threading.Lock  # one load at a time: each sets the number of threads of the process for a while
    loaded: Loaded | None = None
    failed: tuple | None = None  # the state of the file that could not be loaded, and why; kept while it is tried again
    known: tuple | None = None  # the state of the file that was looked into, and what it says of itself
    loading: Future | None = None

    @property
    def state(self) -> tuple | None:
        """What changes when the file does; None if there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def load(self) -> Future:
        """The load of the weights, which ends without a result: one for all who wait for it, begun where there is none
        or where the file has changed since one failed. Called in the event loop."""
        if self.loading is None or self.loading.done() and self.loaded is None and self.failed[0] != self.state:
            loading = Future()
            # in a thread that ends: OpenMP keeps the helpers of each thread that used it, and with more of them than
            # cores its threads block instead of spinning, which costs a third of the engine's speed
            threading.Thread(target=self._load, args=(loading,), name="loading").start()
            self.loading = loading
        return self.loading

    def opened(self) -> Loaded:
        """The weights, after their load. Raises ApiError if it failed."""
        if self.loaded is None:
            raise ApiError(500, f"model {self.name} cannot be loaded: {self.failed[1]}", code="model_not_loaded")
        return self.loaded

    def _load(self, loading: Future) -> None:
        with self.lock:
            compute_with(self.threads)
            state, begin = self.state, time.perf_counter()
            try:
                loaded = open_weights(self.args)
                _ = loaded.decoder.native  # created here, not at the first token
                for line in (*loaded.described, loaded.decoder.computed_by):
                    print(line, file=sys.stderr, flush=True)
                print(f"{self.name} loaded in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
                self.loaded = loaded
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                self.failed = (state, self._without_folders(str(error)))
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self.failed = (state, type(error).__name__)
        loading.set_result(None)

    def _without_folders(self, message: str) -> str:
        """A message for the client, who need not know the server's folders."""
        for path in filter(None, (self.path, self.args.tokenizer_path)):
            message = message.replace(str(path), Path(path).name)
        return message

    def about(self) -> dict:
        """The model as /v1/models shows it."""
        stage, context = self._stage_and_context()
        thinks, continues = (None, None) if stage is None else (stage == "distill", stage == "pretrain")
        state = self.state
        return {"id": self.name, "object": "model", "created": state[0] // 10**9 if state else 0,
                "owned_by": "weakwater", "weakwater": {"stage": stage, "thinks": thinks, "continues_text": continues,
                                                       "context": context}}

    def _stage_and_context(self) -> tuple[str | None, int | None]:
        """(stage, context) of the weights, without loading them; None where the file does not say."""
        if self.loaded is not None:
            return self.loaded.stage, self.loaded.model.config.max_seq_len
        state = self.state
        if self.known is None or self.known[0] != state:
            says = None, None
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
                says = str(content["meta"].get("stage", self.name)), content["config"]["max_seq_len"]
            except Exception:  # noqa: S110  each kind of damage raises its own type; `open` names the damage
                pass
            self.known = state, says
        return self.known[1]


class Models:
    """The models that the flags of serve.py name: `checkpoint`, or the stages in `out_dir`. Raises UserError where
    there is none."""

    def __init__(self, args):
        self.all = []
        shared = torch.get_num_threads(), threading.Lock()
        if args.checkpoint is not None:
            path = Path(args.checkpoint)
            if not path.is_file():
                raise UserError(f"--checkpoint {path}: no such file")
            load_weights(path)  # raises UserError for a file of another kind
            self.all = [Model(path.stem, path, args, *shared)]
        else:
            modes = {stage: mode for mode, stage in STAGES.items()}
            for stage in BEST_FIRST:
                its_args = copy.copy(args)
                its_args.model_mode = modes[stage]
                self.all.append(Model(stage, Path(args.out_dir) / f"{stage}.pth", its_args, *shared))
            if not self.present:
                quickstart = Path("out/quickstart")
                hint = (f"the quickstart's are there with --out_dir {quickstart}" if any(quickstart.glob("*.pth")) else
                        "pretrain.py, SFT.py, SFT_long.py and distill.py make them, and bash quickstart.sh runs all")
                wrong = "no weights in it" if Path(args.out_dir).is_dir() else "no such folder"
                raise UserError(f"--out_dir {args.out_dir}: {wrong}; {hint}")

    @property
    def present(self) -> list[Model]:
        """The models whose file is there, best first."""
        return [model for model in self.all if model.loaded is not None or model.path.is_file()]

    def named(self, name: str | None) -> Model:
        """The model of a name. Raises ApiError."""
        present = self.present
        for model in present:
            if model.name == name or name in (None, "", DEFAULT):
                return model
        shown = name if len(name or "") <= 80 else f"{name[:80]}…"
        names = ", ".join(model.name for model in present) or "none"
        raise ApiError(404, f"the model '{shown}' does not exist (there is: {names})", "model", "model_not_found")
