"""Stage 2: supervised fine-tuning on dialogues of up to 512 tokens.

one GPU      python SFT.py
two cores    python SFT.py --batch_size 8
resume       the same command with --resume

Reads {"conversations": [...]} lines, and beside them some pretraining text, without which what was learned from it
fades: 0.9 and 0.1 of the tokens. Starts from out/pretrain.pth and writes out/SFT.pth, which SFT_long.py starts from.
Only the assistant's words and the `</s>` that ends them have a loss, and all of the text. Whole conversations are
packed end to end without padding; attention stays inside each conversation.
"""

import math
import sys
import time

import torch

from common import exits, runtime
from common.continuation import continuation
from common.optim import learning_rate, make_optimizers, set_learning_rate
from common.run_state import RunState
from common.runlog import RunLog
from common.scoring import score_documents
from Config import DISTILL_ONLY, parse_args
from dataset import StepLoader, load_splits
from fastpath import accelerate
from text.content import Reading
from text.sources import find_mixture


def main(argv: list[str] | None = None, stage: str = "SFT", description: str = __doc__, previous: str = "pretrain",
         **defaults) -> None:
    # ---- arguments, device, precision, seed ---------------------------------------------------
    defaults = dict(data_path="sft_512=0.9 pretrain=0.1", max_seq_len=512, min_tokens=0, max_tokens=512, batch_size=32,
                    learning_rate=1e-3) | defaults
    args = parse_args(stage, description, argv, previous, leave_out=DISTILL_ONLY, **defaults)
    sources, mixture = find_mixture(args.data_path, args.default_data)
    ranks = runtime.Distributed()
    device, dtype, lines = runtime.set_up(args, ranks)
    run = RunState(args, ranks)
    log = RunLog(args.out_dir, args.stage, ranks.is_main)
    log.print("\n".join(lines + mixture))

    # ---- tokenizer and data -------------------------------------------------------------------
    tokenizer = run.choose_tokenizer()
    reading = Reading.of(args, "chat")
    with ranks.main_first():
        train, val = load_splits(sources, args.val_path, tokenizer, reading, args.cache_dir,
                                 args.max_seq_len, args.min_tokens, args.max_tokens, args.max_bad_ratio, log.print,
                                 args.max_text_loss)
    train.own_first = args.default_data  # an epoch is then one pass over the stage's own data
    if not args.default_data:
        train.say_what_fades(reading, log.print)
    loader = StepLoader(train, args.max_seq_len, args.batch_size, args.accumulation_steps, args.seed, args.order,
                        ranks.rank, ranks.world_size)

    # ---- model and starting weights -----------------------------------------------------------
    net = run.build_model().to(device).train()
    net.model.gradient_checkpointing = args.gradient_checkpointing
    computed_by = accelerate(net, device, dtype, args.compile, plain=args.plain)
    if args.compile:
        log.print(f"compile: {runtime.compile_blocks(net, device, log.print)}")
    model = ranks.wrap(net)

    # ---- optimizer, and the state to resume ---------------------------------------------------
    optimizers = make_optimizers(net, args.optimizer, args.learning_rate, args.weight_decay, args.beta2,
                                 args.weight_decay_on)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    run.restore(net, optimizers, scaler, loader, val, device, dtype, computed_by, log)
    log.describe(run, net, loader)
    if run.finished_before():
        return

    # ---- the loop -----------------------------------------------------------------------------
    if args.use_wandb:
        log.start_wandb(args.wandb_project, run.settings)
    advice = runtime.BatchSizeAdvice(args, net, device, dtype, loader.tokens_per_epoch)
    with runtime.StopSignal() as signal, advice:
        next_batch = loader.step(*run.epoch_and_step(run.steps_done))
        for step in range(run.steps_done, run.total_steps):
            begin = time.perf_counter()
            lr = learning_rate(step, run.total_steps, args.learning_rate, args.lr_schedule, args.warmup_ratio,
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
            if step + 1 < run.total_steps:  # while a GPU is at work
                next_batch = loader.step(*run.epoch_and_step(step + 1))
            loss, norm, stop, save = run.synchronize(loss_sum, grad_norm, signal.number)
            if run.may_step(loss, norm, batch):
                for optimizer in optimizers:
                    optimizer.step()
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            run.advance(batch.tokens)
            log.meter.add(batch.tokens, time.perf_counter() - begin)

            scores = None
            if run.is_due(args.eval_interval):
                scores = score_documents(net, val, args.max_seq_len, loader.micro_batch_tokens, args.eval_tokens,
                                         device, dtype, ranks)
                run.save_if_best(scores)
                if ranks.is_main:
                    log.print(continuation(net, tokenizer, val, device, dtype))
            if scores or run.is_due(args.log_interval):
                log.step(run, loss, lr, norm, scores)
            if run.is_last or stop or save:
                run.save()
                log.charts()
            if stop and not run.is_last:
                runtime.stop_by_signal(signal.number, args, run.steps_done)
    log.summary(run)


if __name__ == "__main__":
    sys.exit(exits.run(main))
