"""What is measured, and how it is added up. Imports torch and nothing else."""
