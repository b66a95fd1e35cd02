"""The bare worker, for those who bring their own launcher: `deepspeed launch/pretrain.py RECIPE --run-dir R`."""

from mslt.cli.worker import main

if __name__ == "__main__":
    main()
