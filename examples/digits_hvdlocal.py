"""The same script with Local SGD and LocalAdaScale: compare it with digits_horovod.py.

mpirun -np 2 --bind-to none python examples/digits_hvdlocal.py
"""

import torch
from sklearn.datasets import load_digits

import hvdlocal

comm = hvdlocal.init()
torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
test = torch.arange(len(x)) % 6 == 0
x_train, y_train = x[~test][comm.rank :: comm.size], y[~test][comm.rank :: comm.size]

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = hvdlocal.LocalOptimizer(
    optimizer, model, period=hvdlocal.ConstantPeriod(8), scaling=hvdlocal.LocalAdaScale()
)

steps = len(y[~test]) // comm.size // 32  # the same on every rank
for _ in range(20):
    order = torch.randperm(len(x_train))
    for i in range(steps):
        batch = order[32 * i : 32 * (i + 1)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()
optimizer.synchronize()

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
if comm.rank == 0:
    print(f"test accuracy {100 * accuracy:.1f} %, {optimizer.round} averagings, last gain {optimizer.gain:.2f}")
