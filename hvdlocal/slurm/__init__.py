"""sbatch scripts made from the templates of slurm/, which are installed with the package."""
