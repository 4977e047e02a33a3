#!/bin/sh
# Predict the mounted case with the mounted model. Set in the image, or with `docker run --env`:
# PANTHER_TASK (t1, t2) and PANTHER_OPTIONS. Arguments of `docker run` are added.
set -eu
model=${PANTHER_MODEL:-/opt/ml/model}
if [ -f "$model/ensemble.json" ]; then
    set -- --ensemble "$model/ensemble.json" "$@"
else
    set -- --model "$model" "$@"
fi
# shellcheck disable=SC2086 # options are words
exec python -m panther_jax.predict_challenge --task "$PANTHER_TASK" ${PANTHER_OPTIONS:-} "$@"
