"""The family's text encoder, trained to tell a caption's words; after that it stays as it is, like CLIP's in SD1.5."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .captions import END, NUMBER_SCENES, SCENES, WORDS, Tokenizer, by_lot
from .model import TEXT_WIDTH, new_text
from .text_encoder import TextEncoder


def train(tokenizer: Tokenizer, seed: int, say: Callable[[str], None], steps: int, size: int = 32) -> TextEncoder:
    """A linear map of the state at the first end token names the caption's words; words are left out by lot."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model, head = new_text(tokenizer), nn.Linear(TEXT_WIDTH, len(WORDS))
    among = [str(scene) for scene in (*SCENES, *NUMBER_SCENES * 6)]
    end = tokenizer.numbers[END]
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps + 1)
    for step in range(1, steps + 1):
        captions = by_lot(among, size, random)
        words = [[w for w in c.split() if torch.rand((), generator=random) > 0.15] for c in captions]
        right = torch.tensor([[float(word in row) for word in WORDS] for row in words])
        ids = tokenizer([" ".join(row) for row in words])
        states = model(ids)
        place = (ids == end).int().argmax(1)
        loss = F.binary_cross_entropy_with_logits(head(states[torch.arange(size), place]), right)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rates.step()
        if step % 100 == 0:
            say(f"text encoder {step}/{steps}: loss {float(loss.detach()):.4f}")
    return model
