"""A reward model from pairs, with the Trainer of transformers, in seconds on a CPU."""

import torch
from transformers import LlamaConfig, LlamaModel, Trainer, TrainingArguments

from rewardfuse import RewardModel
from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations.transformers import ForTrainer, PairDataCollator, PairLossFunc

tokenizer = byte_tokenizer()  # or AutoTokenizer.from_pretrained(...)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = RewardModel(LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **sizes)))  # or RewardModel.from_pretrained(...)

texts = [(f"Item {i} is in stock.", f"Item {i}? No idea.") for i in range(81)]
pairs = [{"chosen_ids": tokenizer(a)["input_ids"], "rejected_ids": tokenizer(b)["input_ids"]} for a, b in texts]

arguments = TrainingArguments(
    output_dir="reward-model",
    remove_unused_columns=False,  # the Trainer would drop chosen_ids and rejected_ids
    per_device_train_batch_size=4,
    gradient_accumulation_steps=5,  # 81 pairs: the last steps are smaller, and weigh what they hold
    learning_rate=1e-2,
    num_train_epochs=3,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
)
collator = PairDataCollator(tokenizer)
loss_func = PairLossFunc(label_smoothing=0.02)
trainer = Trainer(ForTrainer(model), arguments, collator, pairs, pairs, compute_loss_func=loss_func)
print("before", trainer.evaluate()["eval_loss"])
trainer.train()
print("after", trainer.evaluate()["eval_loss"])
model.save_pretrained("reward-model")  # for RewardModel.from_pretrained; the Trainer's checkpoints are for resuming
tokenizer.save_pretrained("reward-model")
