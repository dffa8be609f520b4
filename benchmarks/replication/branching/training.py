"""The one training loop: the seed, the experts and every method that combines them go through it."""

import time
from collections.abc import Callable, Iterable
from typing import Optional

import torch
from torch import nn
from tqdm import tqdm


def mix(blocks: dict[str, torch.Tensor], shares: dict[str, float], count: int, seed: int) -> torch.Tensor:
    """`count` blocks in random order, the domains in the given shares; too few blocks are gone through again."""
    generator = torch.Generator().manual_seed(seed)
    whole = {domain: int(share * count) for domain, share in shares.items()}
    whole[max(shares, key=shares.get)] += count - sum(whole.values())
    rows = []
    for domain, wanted in whole.items():
        have = len(blocks[domain])
        passes = [torch.randperm(have, generator=generator) for _ in range(-(-wanted // have))]
        if passes:
            rows.append(blocks[domain][torch.cat(passes)[:wanted]])
    rows = torch.cat(rows)
    return rows[torch.randperm(len(rows), generator=generator)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def autocast(device: torch.device):
    """bf16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(
    model: nn.Module,
    rows: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    desc: str,
    constant: bool = False,
    pauses: Iterable[int] = (),
    at_pause: Optional[Callable[[int], None]] = None,
) -> dict[str, float]:
    """Train what of `model` requires gradients on `rows` (N, 2, T), N / steps of them at a time.

    AdamW; the learning rate rises over the first twentieth, then falls along a cosine to 1% (as in the paper), or
    stays (`constant`). After each step in `pauses`, `at_pause(step)` is called; its time does not count.

    Returns:
        The last loss (mean of the last tenth), and the median seconds of a step.
    """
    device = device_of(model)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # With a second moment over 1000 steps (0.999), arithmetic takes much longer to learn.
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 1.0 if constant else 0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, seconds, pauses = [], [], set(pauses)
    model.train()
    bar = tqdm(range(1, steps + 1), desc=desc, leave=False, mininterval=1)
    for step, batch in zip(bar, rows.to(device).chunk(steps)):
        start = time.perf_counter()
        with autocast(device):
            loss = model(input_ids=batch[:, 0], labels=batch[:, 1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        losses.append(loss.item())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{sum(losses[-10:]) / 10:.3f}", refresh=False)
        if step in pauses:
            model.eval()
            at_pause(step)
            model.train()
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last), "seconds_per_step": sorted(seconds)[len(seconds) // 2]}
