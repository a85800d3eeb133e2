"""GRPO in TRL with this library's log-probs and KL: a tiny random model learns to write vowels. CPU, seconds."""

import tempfile

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from rewardfuse.byte_tokenizer import byte_tokenizer
from rewardfuse.integrations.trl import GRPOConfig, GRPOTrainer  # was: from trl import GRPOConfig, GRPOTrainer

folder, tokenizer = tempfile.mkdtemp(), byte_tokenizer()
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
model.save_pretrained(folder)  # TRL loads the reference from here


def vowels(completions, **_):
    return [sum(map(text.count, "aeiou")) / 4 for text in completions]


options = {"kl_estimator": "k3", "kl_gradient_estimator": "k2", "beta": 0.01}  # the first two: this library's
hardware = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": folder, "save_strategy": "no"}
sampling = {"per_device_train_batch_size": 64, "num_generations": 16, "max_completion_length": 8}
args = GRPOConfig(max_steps=40, logging_steps=10, learning_rate=1e-2, **options, **sampling, **hardware)
prompts = Dataset.from_list([{"prompt": text} for text in ("say: ", "sing: ", "tell: ", "write: ")])
trainer = GRPOTrainer(folder, vowels, args, prompts, processing_class=tokenizer)
trainer.train()
print([(round(step["reward"], 2), round(step["kl"], 2)) for step in trainer.state.log_history if "reward" in step])
