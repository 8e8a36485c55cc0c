"""Fine-tune a small BERT with accelerate, to tell which sentences are about animals."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import everystep  # added

EPOCHS, BATCH, LENGTH, ACCUMULATE = 3, 8, 10, 2
ANIMALS, THINGS = ["cat", "dog", "horse", "owl", "trout"], ["stone", "spoon", "lamp", "brick", "boat"]
VERBS, PLACES = ["saw", "lost", "painted", "carried"], ["yesterday", "today", "outside", "there", "here"]
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "the", "a", "we", "they", *ANIMALS, *THINGS, *VERBS, *PLACES]


def sentences(count):
    """Sentences, each with whether it is about an animal."""
    for _ in range(count):
        about = int(torch.randint(2, ()))
        words = [["we", "they"], VERBS, ["the", "a"], [THINGS, ANIMALS][about], PLACES]
        chosen = [each[int(torch.randint(len(each), ()))] for each in words]
        yield chosen[: int(torch.randint(4, 6, ()))], about


def collate(samples):
    """Pad the sentences of a batch to the longest one."""
    rows = [["[CLS]", *words, "[SEP]"] for words, _ in samples]
    longest = max(map(len, rows))
    padded = [row + ["[PAD]"] * (longest - len(row)) for row in rows]
    ids = torch.tensor([[VOCABULARY.index(word) for word in row] for row in padded])
    labels = torch.tensor([label for _, label in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def accuracy():
    model.eval()
    correct = 0
    for batch in test_loader:
        with torch.no_grad():
            found = model(**batch).logits.argmax(1)
        correct += (accelerator.gather_for_metrics(found) == batch["labels"]).sum().item()
    return correct / len(test_loader.dataset)


accelerator = Accelerator(cpu=True)
set_seed(12)
samples = list(sentences(96))
train_loader = DataLoader(samples[:72], batch_size=BATCH, shuffle=True, collate_fn=collate)
test_loader = DataLoader(samples[72:], batch_size=24, collate_fn=collate)
config = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=LENGTH,
)
model = BertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = get_linear_schedule_with_warmup(optimizer, 2, EPOCHS * len(train_loader) // ACCUMULATE)
prepared = accelerator.prepare(model, optimizer, train_loader, test_loader, schedule)
model, optimizer, train_loader, test_loader, schedule = prepared
log = {"loss": 0.0, "scores": []}

parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "log": log}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for epoch in recording.epochs(EPOCHS):  # was: range(EPOCHS)
        model.train()
        for number, batch in recording.steps(enumerate(train_loader, 1)):  # was: enumerate(...)
            loss = model(**batch).loss
            accelerator.backward(loss / ACCUMULATE)
            log["loss"] = loss.item()
            if number % ACCUMULATE == 0 or number == len(train_loader):
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            recording.log(loss=loss)  # added
        log["scores"].append(accuracy())
        accelerator.print(f"epoch {epoch}: loss {log['loss']:.6f}, accuracy {log['scores'][-1]:.3f}")
        torch.save(accelerator.unwrap_model(model).state_dict(), f"model-{epoch}.pt")

Path("scores.json").write_text(json.dumps(log["scores"]))
