"""Evaluate: test a classifier on all views of every sample, and write each prediction.

    python launchers/slurm_evaluate.py --checkpoint runs/demo_finetune
    python launchers/slurm_evaluate.py --checkpoint runs/demo_finetune --nodes 4 --after JOB
    python launchers/slurm_evaluate.py --checkpoint runs/kinetics_finetune --data /data/kinetics400 --clips 10

On SLURM where there is one, else on this machine. `--help` lists every flag.
"""

from convmae.launch import main

if __name__ == "__main__":
    main(recipe="convmae.recipes:evaluate")
