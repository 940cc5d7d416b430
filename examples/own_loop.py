"""A training loop of one's own that can be interrupted anywhere: the same command continues it, bit for bit.

mpirun -np 2 --bind-to none python examples/own_loop.py runs/own_loop
"""

import sys

import torch
from sklearn.datasets import load_digits

import hvdlocal

comm = hvdlocal.init()
torch.manual_seed(comm.rank)  # for dropout; all ranks begin with rank 0's weights
torch.set_num_threads(1)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
test = torch.arange(len(x)) % 6 == 0
x_train, y_train = x[~test][comm.rank :: comm.size], y[~test][comm.rank :: comm.size]
steps_per_epoch = len(y[~test]) // comm.size // 32  # the same on every rank
total = 20 * steps_per_epoch

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(128, 10))
optimizer = hvdlocal.LocalOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, period=hvdlocal.ConstantPeriod(16)
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
best = {"accuracy": 0.0}


def accuracy() -> float:
    """The share of test digits that the average recognises."""
    optimizer.synchronize()
    model.eval()
    with torch.no_grad():
        correct = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    model.train()
    return correct


checkpoints = hvdlocal.Checkpoints(
    sys.argv[1] if len(sys.argv) > 1 else "runs/own_loop",
    optimizer=optimizer,
    model=model,
    state={"schedule": schedule, "best": best},
    every_steps=20,
)
checkpoints.resume()
for step in range(checkpoints.steps, total):
    epoch, i = divmod(step, steps_per_epoch)
    order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(epoch))  # a function of the position
    batch = order[32 * i : 32 * (i + 1)]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
    optimizer.step()
    schedule.step()
    if (step + 1) % (5 * steps_per_epoch) == 0:
        best["accuracy"] = max(best["accuracy"], accuracy())
    checkpoints.after_step()

optimizer.synchronize()
if comm.rank == 0:
    torch.save(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, f"{checkpoints.directory}/model.pt"
    )
    print(f"best test accuracy {100 * best['accuracy']:.1f} %, {optimizer.round} averagings")
checkpoints.finish()
