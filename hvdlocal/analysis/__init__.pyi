from .cost import pseudo_wall_clock as pseudo_wall_clock
from .plan import RunPlan as RunPlan, plan_run as plan_run
from .rounds import Round as Round, plan_rounds as plan_rounds
from .scaling import (
    Link as Link,
    allreduce_seconds as allreduce_seconds,
    doubling_seconds as doubling_seconds,
    halving_seconds as halving_seconds,
    ring_seconds as ring_seconds,
    straggler_factor as straggler_factor,
)
