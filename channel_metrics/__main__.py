"""`python -m channel_metrics`, and `torchrun -m channel_metrics`."""

from channel_metrics.cli.main import main

if __name__ == "__main__":
    main()
