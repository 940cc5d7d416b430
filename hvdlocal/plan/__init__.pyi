from .cost import pseudo_wall_clock as pseudo_wall_clock
from .crossover import crossovers as crossovers, skyline as skyline
from .run_plan import RunPlan as RunPlan, plan_run as plan_run
