"""Evaluates a trained model on contexts longer than it was trained on:

python eval.py --workdir=DIR [--lengths=512,1024,...] [--step=latest|best|N] [--data=STORE] [--name=NAME]
               [--num_documents=N] [--position.scaling=yarn ...]

Model, data and lengths come from the config saved in the workdir; results go to DIR/eval/NAME.{json,npz,png}.
"""

from sympow_jax.commands import eval_main, run_program

if __name__ == "__main__":
    run_program(eval_main)
