"""The plain recipe a user would write today: transformers.Trainer + peft LoRA, library defaults.

Reads a CSV (text, label), encodes, trains, evaluates after every epoch, saves. It is the other side
of ``speed.py`` and deliberately knows nothing of noiseproof but where the offline encoder lies.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

STARTED = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")  # the library's
    args = parser.parse_args()

    import pandas as pd
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tables = {
        name: pd.read_csv(path) for name, path in (("train", args.train), ("test", args.test))
    }
    classes = sorted(tables["train"]["label"].unique())
    number = {label: place for place, label in enumerate(classes)}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sets = {}
    for name, table in tables.items():
        rows = Dataset.from_dict(
            {"text": table["text"].tolist(), "label": [number[x] for x in table["label"]]}
        )
        sets[name] = rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True),
            batched=True,
            remove_columns=["text"],
        )
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(classes))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=args.rank))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            bf16=args.precision == "bf16",
            use_cpu=args.precision == "bf16" and not torch.cuda.is_available(),  # else refused
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=sets["train"],
        eval_dataset=sets["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda out: {
            "accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())
        },
    )
    trainer.train()
    accuracy = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    trainer.save_model(args.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "seconds": time.perf_counter() - STARTED,
        "peak_memory_mb": peak,
        "test_accuracy": accuracy[-1],
        "precision": "bf16" if trainer.args.bf16 else "fp32",
    }
    with open(f"{args.out}/result.json", "w", encoding="utf-8") as out:
        json.dump(result, out)


if __name__ == "__main__":
    main()
