"""Pretrain: a small VideoConvMAE on the built-in demo clips, or any other recipe on your data.

    python launchers/slurm_pretrain.py
    python launchers/slurm_pretrain.py --nodes 4
    python launchers/slurm_pretrain.py --data /path/to/videos --epochs 100 --folder runs/mine
    python launchers/slurm_pretrain.py --recipe my_lab.runs:ssv2_pretrain --nodes 8 --dry-run

On SLURM where there is one, else on this machine. `--help` lists every flag with the recipe's own defaults.
"""

from convmae.launch import main

if __name__ == "__main__":
    main(recipe="video.recipes:demo")
