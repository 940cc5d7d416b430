"""Makes sbatch scripts from the templates in slurm/, which are installed with the package."""
