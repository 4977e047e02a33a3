#!/bin/sh
# Build the challenge container, save it and the model for the upload, say how to test them.
usage() {
    cat <<'TEXT'
usage: docs/container/pack.sh --task t1|t2 --model FOLDER [options]

  --model FOLDER     bundle, run, or a folder with ensemble.json and what it names
  --output FOLDER    where the two archives go (default: container)
  --tag NAME         name of the image (default: panther-jax-TASK)
  --cpu              without CUDA: smaller, for tests
  --cuda 12|13       CUDA libraries in the image (default: 12; 13 needs a driver from 580 on)
  --options "TEXT"   further options of panther_jax.predict_challenge
  --dry-run          print the commands, run none

example:
  docs/container/pack.sh --task t2 --model data/weights/mri_t2 --options "--largest-component"
TEXT
}
fail() {
    echo "error: $1" >&2
    exit 2
}
set -eu
version=0.10.2 # of JAX: the one that was tested
task='' model='' output=container tag='' jax="jax[cuda12]==$version" options='' run=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --cpu) jax=jax==$version && shift && continue ;;
    --dry-run) run=print && shift && continue ;;
    --task | --model | --output | --tag | --cuda | --options) ;;
    *) fail "unknown option $1; see --help" ;;
    esac
    [ $# -ge 2 ] || fail "$1 needs a value"
    case $1 in
    --task) task=$2 ;;
    --model) model=$2 ;;
    --output) output=$2 ;;
    --tag) tag=$2 ;;
    --cuda) jax="jax[cuda$2]==$version" ;;
    --options) options=$2 ;;
    esac
    shift 2
done
case $task in t1 | t2) ;; *) fail "--task must be t1 or t2, found '$task'" ;; esac
[ -d "$model" ] || fail "--model '$model' is not a folder"
model=$(cd "$model" && pwd)
tag=${tag:-panther-jax-$task}
case $output in /*) ;; *) output=$PWD/$output ;; esac
[ "$run" = print ] || mkdir -p "$output"
cd "$(dirname "$0")/../.."

# Print a command so that it can be pasted; run it unless --dry-run.
step() {
    printf '%s\n' "$1"
    [ "$run" = print ] || sh -c "set -e; $1"
}
quoted() { printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"; }

image=$(quoted "$output/$tag.tar.gz") archive=$(quoted "$output/model.tar.gz")
step "docker build --platform linux/amd64 --file docs/container/Dockerfile\
 --build-arg TASK=$task --build-arg JAX=$(quoted "$jax") --build-arg OPTIONS=$(quoted "$options")\
 --tag $(quoted "$tag") ."
# Saved first, then compressed: a failure of docker inside a pipe would go unnoticed.
step "docker save --output $(quoted "$output/$tag.tar") $(quoted "$tag")"
step "gzip --force $(quoted "$output/$tag.tar")"
step "tar --create --gzip --dereference --file $archive --directory $(quoted "$model") ."

gpus='--gpus all '
[ "$jax" = "jax==$version" ] && gpus=''
echo
echo "Upload $image as the container and $archive as the model."
echo "Test on one case: put the image into CASE/images/abdominal-$task-mri/, then"
echo "  mkdir -p RESULT && chmod 777 RESULT"
echo "  docker run --rm --network none $gpus--volume \"\$PWD/CASE\":/input:ro\
 --volume \"\$PWD/RESULT\":/output --volume $(quoted "$model"):/opt/ml/model:ro $(quoted "$tag")"
