"""A reward model from ranked lists in TRL's manner, each response encoded once: tiny, on a CPU, in seconds."""

from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations.trl import ListwiseRewardConfig, ListwiseRewardTrainer

tokenizer = byte_tokenizer()
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes))

answers = ["It is in stock, in aisle 4.", "It is in stock.", "Perhaps.", "No idea."]
lists = [{"prompt": f"{i}: ", "responses": answers[: 2 + i % 3], "order": [*range(2 + i % 3)]} for i in range(120)]
ours = {"loss": "plackett_luce", "pooling": "attention_mask", "row_layout": "packed"}
hardware = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": "ranked-reward", "save_strategy": "no"}
args = ListwiseRewardConfig(num_train_epochs=2, logging_steps=10, learning_rate=5e-3, **ours, **hardware)
trainer = ListwiseRewardTrainer(model, args, train_dataset=Dataset.from_list(lists), processing_class=tokenizer)
trainer.train()
print([(step["loss"], step["accuracy"]) for step in trainer.state.log_history if "loss" in step])
