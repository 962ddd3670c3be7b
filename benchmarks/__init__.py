"""What the library costs: `make bench`. Results with machine and versions lie in results/."""
