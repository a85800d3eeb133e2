"""A reward model in TRL with this library's loss, pooling and rows without padding: tiny, on a CPU, in seconds."""

from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations.trl import RewardConfig, RewardTrainer  # was: from trl import RewardConfig, RewardTrainer

tokenizer = byte_tokenizer()
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes))

pairs = [{"prompt": f"{i}: ", "chosen": "It is in stock.", "rejected": "No idea " * (1 + i % 9)} for i in range(160)]
votes = [{**pair, "target": (0.95, 0.8)[i % 2]} for i, pair in enumerate(pairs)]  # the share of raters who agree
ours = {"label_smoothing": 0.02, "pooling": "attention_mask", "row_layout": "grouped"}
hardware = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": "reward-model", "save_strategy": "no"}
args = RewardConfig(num_train_epochs=2, logging_steps=10, learning_rate=5e-3, **ours, **hardware)
trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list(votes), processing_class=tokenizer)
trainer.train()
print([(step["loss"], step["accuracy"]) for step in trainer.state.log_history if "loss" in step])
