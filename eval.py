"""Evaluates a trained model, by default on contexts longer than it was trained on:

python eval.py --workdir=DIR [--lengths=512,1024,...] [--step=latest|best|N] [--data=STORE] [--name=NAME]
               [--num_documents=N] [--window=N --stride=N] [--position.scaling=yarn ...]
python eval.py --workdir=DIR --remembrance [--lengths=...] [--num_documents=N] [--data=STORE] [--name=NAME]
python eval.py --workdir=DIR --task=mqar|copy|selective_copy|passkey|needle [--lengths=...] [--num_examples=N]
               [--pairs=8,16,...] [--depths=0,0.5,1] [--data=STORE] [--name=NAME]

Model, data and lengths come from the config saved in the workdir; a run trained on a task is asked that task.
It runs on the run's mesh, or on --mesh.data=N --mesh.fsdp=N --mesh.tensor=N --mesh.seq=N, as one process or as one of
several with the flags of train.py; the numbers are those of one device. Results go to DIR/eval/NAME.{json,npz,png}.
--pairs belongs to mqar and selective_copy, --depths to passkey and needle, whose haystack is --data. --remembrance asks
what the end of a text of the longest length owes to the tokens before each position, and how large the states get.
"""

from sympow_jax.eval import main

if __name__ == "__main__":
    main()
