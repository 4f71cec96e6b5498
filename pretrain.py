"""Stage 1: next-token prediction on plain text.

one GPU      python pretrain.py --data_path data/pretrain.jsonl
two cores    python pretrain.py --data_path data/pretrain.jsonl --preset weakwater-5m --batch_size 8
go on        the same command with --resume

Reads {"text": ...} lines and writes out/pretrain.pth, which SFT.py starts from. Every token of a document but
its first is predicted from those before it. Documents stand end to end in rows of --max_seq_len tokens, and
none sees another.
"""

import math
import sys
import time
from bisect import bisect_right
from pathlib import Path

import torch

from common import checkpoint, runtime
from common.optim import learning_rate, make_optimizers, set_learning_rate
from common.runlog import Meter, RunLog, describe_run
from common.scoring import score
from Config import CHAT_ONLY, DISTILL_ONLY, parse_args
from dataset import StepLoader, TextEncoder, evaluated, evaluation_batches, load_splits, load_tokenizer
from fastpath import accelerate


def main(argv: list[str] | None = None) -> None:
    # ---- arguments ----------------------------------------------------------------------------
    args = parse_args("pretrain", __doc__, argv, leave_out=CHAT_ONLY + DISTILL_ONLY,
                      original=dict(batch_size=84, accumulation_steps=2),
                      init_from="none", max_seq_len=512, batch_size=32, learning_rate=4e-3)
    out = Path(args.out_dir)

    # ---- device, precision, seed --------------------------------------------------------------
    ranks = runtime.Ranks()
    device, device_reason = runtime.pick_device(args.device)
    dtype, dtype_reason = runtime.pick_dtype(args.dtype, device)
    ranks.start(device)
    runtime.prepare(device, args.seed, args.deterministic)
    resumed = checkpoint.begin(args, ranks, "pretrain.py")
    log = RunLog(args.out_dir, args.stage, ranks.is_main)
    log.print(f"{args.command}\n{runtime.describe_machine(device)}")
    log.print(f"device {device}: {device_reason}\ndtype {dtype}: {dtype_reason}")

    # ---- tokenizer and data -------------------------------------------------------------------
    tokenizer = load_tokenizer(args.tokenizer_path)
    encoder = TextEncoder.of(tokenizer)
    with ranks.main_first():
        train, val = load_splits(args.data_path, args.val_path, tokenizer, "text", args.cache_dir or str(out / "cache"),
                                 args.max_seq_len, max_bad_ratio=args.max_bad_ratio, say=log.print)
    loader = StepLoader(train, args.max_seq_len, args.batch_size, args.accumulation_steps, args.seed, args.order,
                        ranks.rank, ranks.world_size)
    epoch_ends = loader.epoch_ends(args.epochs, args.max_steps)
    total_steps = min(epoch_ends[-1], args.max_steps or epoch_ends[-1])

    # ---- model and starting weights -----------------------------------------------------------
    net, start_sha256, inherited = checkpoint.starting_model(args, resumed, encoder)
    net.to(device).train()
    net.model.gradient_checkpointing = args.gradient_checkpointing
    computed_by = accelerate(net, device, dtype, args.compile, plain=args.plain)
    if args.compile:
        log.print(f"compile: {runtime.compile_blocks(net, device, log.print)}")
    model = ranks.wrap(net)
    for line in computed_by + inherited + describe_run(net, loader, val, args, ranks.world_size, total_steps):
        log.print(line)

    # ---- optimizer and schedule ---------------------------------------------------------------
    optimizers = make_optimizers(net, args.optimizer, args.learning_rate, args.weight_decay, args.beta2, args.decayed)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    log.print(f"{args.optimizer}, {args.lr_schedule} schedule, peak learning rate {args.learning_rate}")

    # ---- resume -------------------------------------------------------------------------------
    settings = checkpoint.steering_settings(args, dtype, device.type, ranks.world_size, train.fingerprint(),
                                            encoder.fingerprint, start_sha256)
    done = tokens = 0
    best_loss, val_scores = math.inf, {}
    if resumed:
        checkpoint.compare_settings(resumed["settings"], settings)
        checkpoint.restore(resumed, optimizers, scaler)
        done, tokens, best_loss, val_scores = (resumed[k] for k in ("step", "tokens", "best_loss", "val_scores"))
    if resumed and resumed.get("computed_by") not in (None, computed_by):
        log.print(f"before, it was computed otherwise: {'; '.join(resumed['computed_by'])}")
    if resumed and resumed["val_sha256"] != val.fingerprint():
        log.print("the validation data changed: the lowest validation loss so far does not count any more")
        best_loss = math.inf
    log.cut_back(done)

    def epoch_and_number(step: int) -> tuple[int, int]:
        """The epoch of an optimizer step, and its number in the epoch."""
        epoch = bisect_right(epoch_ends, step)
        return epoch, step - (epoch_ends[epoch - 1] if epoch else 0)

    def save_weights(path: Path) -> None:
        if ranks.is_main:
            meta = {"stage": args.stage, "step": done, "tokens": tokens, "val": val_scores, "command": args.command,
                    "tokenizer_sha256": encoder.fingerprint, "init_from_sha256": start_sha256, "settings": settings,
                    "computed_by": computed_by}
            checkpoint.save_weights(path, net, meta)

    def save_all() -> None:
        if ranks.is_main:
            state = {"step": done, "tokens": tokens, "best_loss": best_loss, "val_scores": val_scores,
                     "val_sha256": val.fingerprint(),
                     "model": net.state_dict(), "config": net.config.to_dict(), "settings": settings,
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                     "scaler": scaler.state_dict(), "start_sha256": start_sha256, "computed_by": computed_by}
            checkpoint.save_state(state, args.out_dir, args.stage, args.keep_checkpoints)
            schedule.mark_saved()
            save_weights(out / f"{args.stage}.pth")
        ranks.barrier()  # a rank that ends early would take the others, saving, with it

    if done >= total_steps:
        save_weights(out / f"{args.stage}.pth")  # a kill may have come between the last state and the weights
        log.charts()
        log.print(f"finished before, at step {done}: nothing to train; the weights are in {out / args.stage}.pth")
        return

    # ---- the loop -----------------------------------------------------------------------------
    if args.use_wandb:
        log.start_wandb(args.wandb_project, settings)
    meter, schedule = Meter(), checkpoint.SaveSchedule(args.save_interval)
    peak = runtime.peak_flops(device, dtype)
    flops_per_token = net.flops_per_token(min(args.max_seq_len, loader.tokens_per_epoch / len(train)))
    if peak:
        log.print(f"mfu: share of the data sheet's {peak / 1e12:,.0f} TFLOP/s in {dtype}")
    advice = runtime.BatchSizeAdvice(args, net, device, dtype, loader.tokens_per_epoch)
    with runtime.StopSignal() as signal, advice:
        next_batch = loader.step(*epoch_and_number(done))
        for step in range(done, total_steps):
            begin = time.perf_counter()
            epoch, number = epoch_and_number(step)
            lr = learning_rate(step, total_steps, args.learning_rate, args.lr_schedule, args.warmup_ratio,
                               args.decay_ratio, args.min_lr_ratio)
            set_learning_rate(optimizers, lr)
            runtime.seed_step(args.seed, step, ranks.rank)
            batch = next_batch

            # forward, scaled backward, clip, step: these lines are the same in every stage
            loss_sum = torch.zeros((), device=device)
            for count, micro_batch in enumerate(batch.micro_batches, start=1):
                with ranks.gradient_sync(model, now=count == len(batch.micro_batches)):
                    with runtime.autocast(device, dtype):
                        loss = model(**micro_batch.to(device)) / batch.total_weight
                    scaler.scale(loss * ranks.world_size).backward()  # DDP takes the mean over ranks, we the sum
                loss_sum += loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
            if step + 1 < total_steps:  # while a GPU is at work
                next_batch = loader.step(*epoch_and_number(step + 1))
            flags = signal.number, ranks.is_main and schedule.is_due(step + 1)
            seen = ranks.sum(torch.stack([loss_sum, *(torch.full_like(loss_sum, flag) for flag in flags)]))
            loss, stop, save, norm = torch.cat([seen, grad_norm.unsqueeze(0)]).tolist()  # the one synchronisation
            overflow = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > checkpoint.LEAST_SCALE
            if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
                save_all()
                checkpoint.stop_at_non_finite(args, step, loss, norm, batch, loader, net, device, dtype, ranks)
            if math.isfinite(norm):
                for optimizer in optimizers:
                    optimizer.step()
            else:  # fp16 overflowed: the scaler lowers its scale, and this step leaves the weights as they are
                log.print(f"step {step + 1}: gradient overflow in fp16, step skipped at scale {scaler.get_scale():g}")
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

            done, tokens = step + 1, tokens + batch.tokens
            meter.add(batch.tokens, time.perf_counter() - begin)
            last = done == total_steps
            if last or (args.eval_interval and done % args.eval_interval == 0):
                val_scores = score(net, evaluation_batches(val, args.max_seq_len, loader.micro_batch_tokens,
                                                           args.eval_tokens),
                                   val.bytes[:evaluated(val, args.eval_tokens)].sum(), device,
                                   lambda: runtime.autocast(device, dtype), ranks)
                if val_scores["loss"] < best_loss:
                    best_loss = val_scores["loss"]
                    save_weights(out / f"{args.stage}_best.pth")
                fresh = {"val_loss": val_scores["loss"], "val_ppl": val_scores["ppl"], "val_bpb": val_scores["bpb"]}
            else:
                fresh = {}
            if last or fresh or done % args.log_interval == 0:
                rate, left = meter.rate(), meter.minutes(epoch_ends[epoch] - done)
                line = (f"Epoch:[{epoch + 1}/{args.epochs}]({number + 1}/{epoch_ends[epoch] - step + number}) "
                        f"loss:{loss:.3f} lr:{lr:.12f} epoch_Time:{left:.1f}min tokens/s:{rate:,.0f} "
                        f"grad_norm:{norm:.3f}")
                line += f" mfu:{rate * flops_per_token / peak / ranks.world_size:.1%}" if peak else ""
                line += "".join(f" {name}:{value:.4f}" for name, value in fresh.items())
                log.print(line)
                log.metrics(step=done, epoch=epoch + 1, loss=loss, lr=lr, tokens=tokens, tokens_per_second=rate,
                            grad_norm=norm, minutes_left=left, **fresh)
            if last or stop or save:
                save_all()
                log.charts()
            if stop and not last:
                runtime.stop_by_signal(signal.number, args, done)

    # ---- summary ------------------------------------------------------------------------------
    log.print(f"done: {done:,} steps, {tokens:,} tokens, {meter.all_seconds / 60:.1f} min of training; validation loss "
              f"{val_scores['loss']:.4f}, PPL {val_scores['ppl']:.2f}, bits per byte {val_scores['bpb']:.4f}; "
              f"weights in {out / args.stage}.pth")
    log.finish()


if __name__ == "__main__":
    sys.exit(runtime.run(main))
