#!/usr/bin/env python
"""Trains a small byte-level transformer with FusedMoE blocks on the text of Python's own help pages.

One process:

    python scripts/train_lm.py --out log/train_lm

Any grid, for example EP 2 x TP 1 x DP 2 on four processes:

    PADDLE_DISTRI_BACKEND=gloo python -m paddle.distributed.launch --nproc_per_node 4 --log_dir log/train \\
        scripts/train_lm.py --ep 2 --dp 2 --out log/train_lm

The same command again goes on from the last checkpoint in --out, bit by bit as if it had never been
interrupted. --ep, --tp and --dp may change, which changes the order of additions alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

import paddle_moe
from paddle_moe import FusedMoE, ParallelContext
from paddle_moe.console import print_table, progress_bar
from paddle_moe.logs import RankLogger
from paddle_moe.params import random_expert, random_gate_weight

NUM_BYTES = 256
VALIDATION_SHARE = 0.1
VALIDATION_WINDOWS = 32
# What makes it another run. --steps, which says how fast the learning rate falls, may change with a warning.
OF_THE_RUN = (
    *("batch", "sequence", "layers", "hidden", "heads", "experts", "top_k", "ffn", "learning_rate"),
    *("balance_loss", "seed", "eager", "steps"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ep", type=int, default=1, help="ranks that share the experts")
    add("--tp", type=int, default=1, help="ranks that share the columns of each expert")
    add("--dp", type=int, default=1, help="replicas of the EP x TP grid, each with sequences of its own")
    add("--steps", type=int, default=500, help="of the optimizer, in all")
    add("--batch", type=int, default=16, help="sequences per step, of all replicas together")
    add("--sequence", type=int, default=128, help="bytes per sequence")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--hidden", type=int, default=128, help="hidden size")
    add("--heads", type=int, default=2, help="of the attention")
    add("--experts", type=int, default=16, help="per block")
    add("--top-k", type=int, default=4, help="experts per token")
    add("--ffn", type=int, default=512, help="intermediate size of an expert")
    add("--learning-rate", type=float, default=2e-3, help="the highest, after the warm-up")
    add("--balance-loss", type=float, default=0.01, help="weight of the load balancing loss")
    add("--seed", type=int, default=0, help="of weights and sequences")
    add("--eager", action="store_true", help="a loop over the experts in plain Paddle, to compare with")
    add("--out", type=Path, default=Path("log/train_lm"), help="checkpoint, rank logs, picture")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--log-every", type=int, default=20, help="steps between lines, and events of each layer")
    add("--timeout", type=float, default=300.0, help="seconds to wait for a rank")
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        least = 0 if name == "seed" else 1
        if type(value) is int and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.top_k > arguments.experts:
        parser.error(f"--top-k must be at most --experts = {arguments.experts}, got {arguments.top_k}")
    longest = min(map(len, load_text())) - 2
    if arguments.sequence > longest:
        parser.error(f"--sequence must be at most {longest}, as the text is, got {arguments.sequence}")
    if arguments.batch % arguments.dp:
        parser.error(f"--batch must be a multiple of --dp = {arguments.dp}, got {arguments.batch}")
    if arguments.hidden % arguments.heads:
        parser.error(f"--hidden must be a multiple of --heads = {arguments.heads}, got {arguments.hidden}")
    if arguments.eager and arguments.ep * arguments.tp > 1:
        parser.error("--eager has no expert or tensor parallelism: leave --ep and --tp at 1")
    return arguments


# ---------------------------------------------------------------- text


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) bytes of the help pages, in the order of their names."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    return text[:cut], text[cut:]


def unigram_entropy(text: np.ndarray) -> float:
    """Nats per byte of the best model that knows only how frequent each byte is."""
    frequency = np.bincount(text, minlength=NUM_BYTES) / len(text)
    frequency = frequency[frequency > 0]
    return float(-(frequency * np.log(frequency)).sum())


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(inputs, targets), both [len(starts), length]."""
    rows = text[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return paddle.to_tensor(rows[:, :-1]), paddle.to_tensor(rows[:, 1:])


# ---------------------------------------------------------------- model


class EagerMoE(nn.Layer):
    """What one writes without a fused operator: a loop over the experts, with Paddle's autograd."""

    def __init__(self, hidden: int, ffn: int, experts: int, top_k: int, balance_loss: float, seed: int):
        super().__init__()
        weights = [random_expert(seed, expert, hidden, ffn) for expert in range(experts)]
        self.gate_weight = self._parameter(random_gate_weight(seed, hidden, experts))
        self.gate_up = nn.ParameterList([self._parameter(gate_up) for gate_up, _ in weights])
        self.down = nn.ParameterList([self._parameter(down) for _, down in weights])
        self.top_k, self.balance_loss = top_k, balance_loss
        self.logger: RankLogger | None = None

    def _parameter(self, value: np.ndarray) -> paddle.Tensor:
        return self.create_parameter(value.shape, default_initializer=nn.initializer.Assign(value))

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        tokens = x.reshape([-1, x.shape[-1]])
        logits = tokens @ self.gate_weight
        weights, ids = F.softmax(logits).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.logger is not None:
            counts = np.bincount(ids.numpy().ravel(), minlength=len(self.down))
            self.logger.event("moe_call", layer=self.full_name(), tokens_per_expert=counts, experts_min=0)
        output = paddle.zeros_like(tokens)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down)):
            rows, slots = paddle.nonzero(ids == expert, as_tuple=True)
            if not rows.size:
                continue
            gate, up = (tokens[rows] @ gate_up).chunk(2, axis=-1)
            share = weights[rows, slots].unsqueeze(-1)
            output = output.index_add(rows, 0, ((F.silu(gate) * up) @ down) * share)
        aux_loss = self.balance_loss * paddle_moe.load_balancing_loss(logits, ids.astype("int32"))
        return output.reshape(x.shape), ids, aux_loss


class Block(nn.Layer):
    """Causal attention, then a mixture of experts, each on the normalised residual stream."""

    def __init__(self, arguments: argparse.Namespace, index: int, parallel: ParallelContext):
        super().__init__()
        hidden, self.heads = arguments.hidden, arguments.heads
        self.attention_norm, self.moe_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        sizes = hidden, arguments.ffn, arguments.experts, arguments.top_k
        seed = arguments.seed * arguments.layers + index
        if arguments.eager:
            self.moe = EagerMoE(*sizes, arguments.balance_loss, seed)
        else:
            self.moe = FusedMoE(
                *sizes, balance_loss_weight=arguments.balance_loss, parallel=parallel, seed=seed
            )

    def forward(
        self, x: paddle.Tensor, mask: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """(output, ids of the experts [T, K], auxiliary loss)"""
        x = x + self.out(self.attend(self.qkv(self.attention_norm(x)), mask))
        tokens = self.moe_norm(x)
        if isinstance(self.moe, FusedMoE):
            mixed, ids, _, aux_loss = self.moe(tokens, return_routing=True, return_aux_loss=True)
        else:
            mixed, ids, aux_loss = self.moe(tokens)
        return x + mixed, ids, aux_loss

    def attend(self, qkv: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
        batch, length, _ = qkv.shape
        heads = [batch, length, self.heads, -1]
        # Apart: Paddle's transpose of five dimensions takes as long as the rest of attention on a CPU.
        q, k, v = (part.reshape(heads).transpose([0, 2, 1, 3]) for part in qkv.chunk(3, axis=-1))
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose([0, 1, 3, 2]) + mask
        return (F.softmax(scores) @ v).transpose([0, 2, 1, 3]).reshape([batch, length, -1])


class LanguageModel(nn.Layer):
    def __init__(self, arguments: argparse.Namespace, parallel: ParallelContext):
        super().__init__()
        paddle.seed(arguments.seed)  # the dense parameters are the same on every rank
        self.bytes = nn.Embedding(NUM_BYTES, arguments.hidden)
        self.positions = nn.Embedding(arguments.sequence, arguments.hidden)
        self.blocks = nn.LayerList([Block(arguments, i, parallel) for i in range(arguments.layers)])
        self.norm = nn.LayerNorm(arguments.hidden)
        self.head = nn.Linear(arguments.hidden, NUM_BYTES)
        future = paddle.triu(paddle.full([arguments.sequence, arguments.sequence], float("-inf")), 1)
        self.register_buffer("future", future, persistable=False)

    def forward(
        self, inputs: paddle.Tensor, targets: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor, list[paddle.Tensor]]:
        """(loss in nats per byte, auxiliary loss, expert ids of each layer) for [B, S] inputs and targets."""
        x = self.bytes(inputs) + self.positions(paddle.arange(inputs.shape[1]))
        aux_loss, routing = paddle.zeros([]), []
        for block in self.blocks:
            x, ids, block_loss = block(x, self.future)
            aux_loss = aux_loss + block_loss
            routing.append(ids)
        return F.cross_entropy(self.head(self.norm(x)), targets), aux_loss, routing


# ---------------------------------------------------------------- training


class CannotResume(ValueError):
    """What is in --out is not a checkpoint to go on from."""


class Trainer:
    """The state of a job: model, optimizer, and the losses so far."""

    def __init__(self, arguments: argparse.Namespace, parallel: ParallelContext, logger: RankLogger):
        self.arguments, self.parallel, self.logger = arguments, parallel, logger
        self.training_text, self.validation_text = load_text()
        self.model = LanguageModel(arguments, parallel)
        decay = paddle.optimizer.lr.CosineAnnealingDecay(arguments.learning_rate, arguments.steps)
        warmup = max(1, min(50, arguments.steps // 10))
        self.schedule = paddle.optimizer.lr.LinearWarmup(decay, warmup, 0.0, arguments.learning_rate)
        self.optimizer = paddle.optimizer.AdamW(
            self.schedule,
            beta2=0.95,
            parameters=self.model.parameters(),
            grad_clip=paddle_moe.ClipGradByGlobalNorm(1.0, parallel),
        )
        paddle_moe.check_optimizer(self.optimizer, parallel)
        self.losses: list[float] = []

    @property
    def checkpoint(self) -> Path:
        return self.arguments.out / "checkpoint"

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one.

        Raises:
            CannotResume: it is that of a run with other arguments, of another program, or damaged.
        """
        index = self.checkpoint / "model.safetensors.index.json"
        if not index.exists():
            return
        try:
            saved, now = dict(json.loads(index.read_text())["state"]["arguments"]), self.of_the_run()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CannotResume(
                f"{index} is not one of train_lm.py, or is damaged ({type(error).__name__}: {error}); pass"
                " another --out to start a new run"
            ) from error
        changed = [name for name in now if saved.get(name) != now[name]]
        flags = [f"--{n.replace('_', '-')} was {saved.get(n)} and is {now[n]}" for n in changed]
        if set(changed) - {"steps"}:
            raise CannotResume(
                f"{self.checkpoint} is that of another run: {'; '.join(flags)}; pass the same to go on"
                " with it, or another --out to start a new one"
            )
        if changed:
            self.say(
                f"WARNING: {flags[0]}: from here on the learning rate falls as for the new number of steps"
            )
        with warnings.catch_warnings():  # Paddle's LinearWarmup warns of the state that it saved itself
            warnings.filterwarnings("ignore", "There are some unused values in state_dict")
            state = paddle_moe.load_checkpoint(
                self.checkpoint, self.model, self.optimizer, parallel=self.parallel, progress=self.is_first
            )
        self.losses = state["losses"]
        self.say(f"resumed from {self.checkpoint} at step {len(self.losses)}")
        if len(self.losses) >= self.arguments.steps:
            self.say(f"nothing left to train: --steps is {self.arguments.steps}")

    def save(self) -> None:
        state = {"losses": self.losses, "arguments": self.of_the_run()}
        paddle_moe.save_checkpoint(
            self.checkpoint, self.model, self.optimizer, state=state, parallel=self.parallel
        )

    def of_the_run(self) -> dict[str, Any]:
        return {name: getattr(self.arguments, name) for name in OF_THE_RUN}

    @property
    def is_first(self) -> bool:
        return self.parallel.rank == 0

    def say(self, text: str) -> None:
        self.logger.info(text)
        if self.is_first:
            print(text, flush=True)

    def batch(self, step: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The sequences of this replica in a step; they depend on the seed and the step alone."""
        random = np.random.default_rng([self.arguments.seed, step])
        last = len(self.training_text) - self.arguments.sequence - 1
        starts = random.integers(0, last, self.arguments.batch)
        share = self.arguments.batch // self.arguments.dp
        own = starts[self.parallel.dp_rank * share :][:share]
        return windows(self.training_text, own, self.arguments.sequence)

    def step(self, logged: bool) -> float:
        for block in self.model.blocks:
            block.moe.logger = self.logger if logged else None
        loss, aux_loss, _ = self.model(*self.batch(len(self.losses)))
        for block in self.model.blocks:
            block.moe.logger = None
        (loss + aux_loss).backward()
        paddle_moe.average_gradients(self.model.parameters(), self.parallel)
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.schedule.step()
        mean = self.parallel.all_reduce(loss.detach(), "dp") / self.arguments.dp
        return float(mean)

    def run(self) -> None:
        """Trains up to --steps, with a checkpoint every --save-every steps and at the end."""
        arguments = self.arguments
        done = len(self.losses)
        tokens, started = 0, time.perf_counter()
        title = "training" if self.is_first and sys.stdout.isatty() else None
        with progress_bar(title, arguments.steps) as advance:
            advance(done)
            while len(self.losses) < arguments.steps:
                logged = (len(self.losses) + 1) % arguments.log_every == 0
                loss = self.step(logged)
                self.losses.append(loss)
                tokens += arguments.batch * arguments.sequence
                step, speed = len(self.losses), tokens / (time.perf_counter() - started)
                self.logger.event("step", step=step, loss=loss, tokens_per_second=speed)
                advance(1, f"loss {loss:.3f}, {speed:,.0f} bytes/s")
                if logged and not sys.stdout.isatty():
                    self.say(f"step {step:>5}  loss {loss:.4f}  {speed:,.0f} bytes/s")
                if step % arguments.save_every == 0 or step == arguments.steps:
                    self.save()

    @paddle.no_grad()
    def validate(self) -> tuple[float, np.ndarray]:
        """(loss on text that was not trained on, share of the slots of each expert [layers, E])."""
        self.model.eval()
        length = self.arguments.sequence
        starts = np.linspace(0, len(self.validation_text) - length - 1, VALIDATION_WINDOWS).astype(int)
        loss, _, routing = self.model(*windows(self.validation_text, starts, length))
        self.model.train()
        counts = [np.bincount(ids.numpy().ravel(), minlength=self.arguments.experts) for ids in routing]
        return float(loss), np.array(counts) / counts[0].sum()


# ---------------------------------------------------------------- results


def report(trainer: Trainer) -> None:
    loss, load = trainer.validate()
    entropy = unigram_entropy(trainer.validation_text)
    trainer.logger.event("result", losses=trainer.losses, validation_loss=loss, unigram_entropy=entropy)
    if not trainer.is_first:
        return
    columns = ("layer", "busiest expert / mean", "idle experts")
    experts = trainer.arguments.experts
    rows = [(i, f"{share.max() * experts:.2f}", int((share == 0).sum())) for i, share in enumerate(load)]
    print_table("Expert load on the validation text", columns, rows)
    print(f"loss on text not trained on: {loss:.3f} nats per byte; entropy of its bytes: {entropy:.3f}")
    result = {"losses": trainer.losses, "validation_loss": loss, "unigram_entropy": entropy}
    (trainer.arguments.out / "result.json").write_text(json.dumps(result))
    draw(trainer, loss, entropy, load)


def draw(trainer: Trainer, validation_loss: float, entropy: float, load: np.ndarray) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    curve, shares = figure.subplots(1, 2, width_ratios=[3, 2])
    curve.plot(range(1, len(trainer.losses) + 1), trainer.losses, lw=1, label="training loss")
    curve.axhline(entropy, color="0.4", ls="--", lw=1, label="entropy of the bytes")
    curve.plot(len(trainer.losses), validation_loss, "o", color="C3", label="loss on text not trained on")
    curve.set(xlabel="step", ylabel="nats per byte", ylim=(0, None))
    curve.legend(frameon=False)
    shown = shares.imshow(load * load.shape[1], aspect="auto", vmin=0, cmap="viridis")
    shares.set(xlabel="expert", ylabel="layer", yticks=range(len(load)), title="tokens per expert / mean")
    figure.colorbar(shown, ax=shares)
    path = trainer.arguments.out / "loss.png"
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except (CannotResume, paddle_moe.CheckpointError) as error:
        sys.exit(f"train_lm.py: {error}")


@one_line_errors()
def main() -> None:
    arguments = parse_arguments()
    sizes = arguments.ep, arguments.tp, arguments.dp
    try:
        parallel = paddle_moe.init_distributed(*sizes, timeout_seconds=arguments.timeout)
    except ValueError as error:
        sys.exit(f"train_lm.py: {error}")
    with parallel:
        logger = paddle_moe.get_rank_logger(
            parallel.ep_rank, parallel.tp_rank, dp_rank=parallel.dp_rank, log_dir=arguments.out
        )
        logger.propagate = False  # `say` prints what is for people
        parallel.log_failures_to(logger)
        trainer = Trainer(arguments, parallel, logger)
        trainer.resume()
        trainer.run()
        report(trainer)
        parallel.barrier()


if __name__ == "__main__":
    main()
