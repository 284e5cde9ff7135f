"""Finetune: from a pretraining run, or from any weights that can be read, to a classifier and its test result.

    python launchers/slurm_finetune.py --checkpoint runs/demo
    python launchers/slurm_finetune.py --checkpoint runs/demo --nodes 4 --after JOB
    python launchers/slurm_finetune.py --recipe video.recipes:kinetics_finetune --data /data/kinetics400 \
        --checkpoint runs/kinetics_pretrain --nodes 8
    python launchers/slurm_finetune.py                                      # from scratch, for comparison

On SLURM where there is one, else on this machine. `--help` lists every flag with the recipe's own defaults.
"""

from convmae.launch import main

if __name__ == "__main__":
    main(recipe="video.recipes:demo_finetune")
