"""One loss over several processes, in a loop of your own: each batch's denominator is that of all processes.

torchrun --nproc_per_node 2 examples/several_processes.py    # or: accelerate launch examples/several_processes.py
"""

import torch
from accelerate import Accelerator

from rewardfuse import plackett_luce_loss

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)  # the same data and weights everywhere
model = torch.nn.Linear(8, 1)
features, lengths = torch.randn(7, 5, 8), torch.tensor([5, 3, 2, 4, 5, 2, 3])  # 7 lists, best first
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

mine = slice(accelerator.process_index, None, accelerator.num_processes)  # 4 lists here, 3 there
own, sizes = features[mine].to(accelerator.device), lengths[mine].to(accelerator.device)
for _ in range(3):
    total = accelerator.reduce(torch.tensor(float(len(own)), device=accelerator.device))  # 7
    scores = model(own).squeeze(-1)
    # DDP and FSDP average gradients over processes, so the sum is divided by the mean number of lists of a process.
    loss = plackett_luce_loss(scores, lengths=sizes, normalizer=total / accelerator.num_processes)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(round(accelerator.reduce(loss.detach(), "mean").item(), 6))
accelerator.end_training()
