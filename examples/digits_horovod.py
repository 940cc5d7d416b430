"""An ordinary Horovod script: data parallelism on handwritten digits.

mpirun -np 2 --bind-to none python examples/digits_horovod.py
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits

hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
test = torch.arange(len(x)) % 6 == 0
x_train, y_train = x[~test][hvd.rank() :: hvd.size()], y[~test][hvd.rank() :: hvd.size()]

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)

steps = len(y[~test]) // hvd.size() // 32  # the same on every rank
for _ in range(20):
    order = torch.randperm(len(x_train))
    for i in range(steps):
        batch = order[32 * i : 32 * (i + 1)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
if hvd.rank() == 0:
    print(f"test accuracy {100 * accuracy:.1f} %")
