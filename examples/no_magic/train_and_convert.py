# %% [markdown]
# # No magic: GPT-2 from building blocks, in three frameworks
#
# A GPT-2 is put together from the blocks of OLM, the package `openlanguagemodel`, and trained for
# some seconds on a CPU. Its checkpoint then moves to Hugging Face and to Megatron, as copies of
# byte ranges; the loss stays the same.
#
# Needs `pip install "megatron-olmo-bridge[megatron]" openlanguagemodel==2.2.1`. Writes into the
# folder `no_magic_output` where it is run.

# %%
import json
from pathlib import Path

import torch
from olm.data.datasets import DataLoader
from olm.nn.attention import FlashAttention
from olm.nn.blocks import OutputHead
from olm.nn.embeddings import AbsolutePositionalEmbedding, Embedding
from olm.nn.feedforward import ClassicFFN
from olm.nn.norms import LayerNorm
from olm.nn.structure import Block
from olm.nn.structure.combinators import Repeat, Residual
from olm.train import AdamW, CheckpointCallback, Trainer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_olmo_bridge import (
    AutoBridge,
    ExportOptions,
    ImportOptions,
    WriteOptions,
    export_checkpoint,
    import_checkpoint,
    verify,
)

OUT = Path("no_magic_output")

# %% [markdown]
# ## The text
#
# Its characters are the tokens.

# %%
TEXT = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimmed,
And every fair from fair sometime declines,
By chance, or nature's changing course untrimmed:
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st,
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st,
So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee.
"""
VOCABULARY = sorted(set(TEXT))
CONTEXT = 64

ids = torch.tensor([VOCABULARY.index(character) for character in TEXT])
windows = ids.unfold(0, CONTEXT + 1, 1)  # [windows, CONTEXT + 1]
inputs, targets = windows[:, :-1], windows[:, 1:]
print(f"{len(TEXT)} characters, {len(VOCABULARY)} different ones")

# %% [markdown]
# ## The model
#
# Every part is visible: two residual branches make a layer, four layers make the model.

# %%
LAYERS, WIDTH, HEADS = 4, 64, 4


def layer() -> Block:
    attention = Block([LayerNorm(WIDTH), FlashAttention(WIDTH, HEADS, causal=True)])
    mlp = Block([LayerNorm(WIDTH), ClassicFFN(WIDTH)])
    return Block([Residual(attention), Residual(mlp)])


torch.manual_seed(0)
embedding = Embedding(len(VOCABULARY), WIDTH)
model = Block([
    Block([embedding, AbsolutePositionalEmbedding(CONTEXT, WIDTH)]),
    Repeat(layer, LAYERS),
    OutputHead(WIDTH, len(VOCABULARY), tied_embedding=embedding),
])  # fmt: skip
for module in model.modules():
    if isinstance(module, torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)  # torch's own is 1, far too large for logits
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Training
#
# OLM's trainer writes `step_100.pt`: the model, the optimizer, the scheduler.

# %%
STEPS = 100

batches = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=16, pin_memory=False)
Trainer(
    model, AdamW, batches, device="cpu", context_length=CONTEXT, use_amp=False, learning_rate=3e-3,
    callbacks=[CheckpointCallback(str(OUT), save_every=STEPS, save_best=False)],
).train(epochs=10, max_steps=STEPS, log_interval=20)  # fmt: skip
checkpoint = OUT / f"step_{STEPS}.pt"

# %% [markdown]
# ## Conversion
#
# The file is a zip that is not compressed, so each tensor is a range of its bytes. The ranges are
# copied to their places; nothing of the file's pickle is run. The number of heads is the one thing
# that it doesn't say.

# %%
heads, again = {"heads": HEADS}, WriteOptions(overwrite=True)
export_checkpoint(checkpoint, OUT / "hf", ExportOptions(kind_options=heads), again)
import_checkpoint(checkpoint, OUT / "megatron", ImportOptions(kind_options=heads), again)
result = verify(OUT / "hf", OUT / "megatron")
print(f"{result.compared} tensors, equal bit for bit: {result.equal}")
print(json.dumps(json.loads((OUT / "hf/config.json").read_text())))

# %% [markdown]
# ## The loss, three times

# %%
with torch.no_grad():
    logits = model.eval()(inputs)
    losses = {"OLM": cross_entropy(logits.flatten(0, 1), targets.flatten()).item()}

    hugging_face = AutoModelForCausalLM.from_pretrained(OUT / "hf").eval()
    logits = hugging_face(inputs).logits
    losses["transformers"] = cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    provider = AutoBridge.from_checkpoint(OUT / "megatron").to_megatron_provider()
    (megatron,) = provider.provide_distributed_model(wrap_with_ddp=False)
    positions = torch.arange(CONTEXT).expand_as(inputs)
    device = torch.cuda.current_device()
    batch = [x.contiguous().to(device) for x in (inputs, positions, targets)]
    losses["Megatron"] = megatron.eval()(*batch[:2], None, labels=batch[2]).mean().item()

for name, loss in losses.items():
    print(f"{name:12} {loss:.7f}")
assert max(losses.values()) - min(losses.values()) < 1e-5
