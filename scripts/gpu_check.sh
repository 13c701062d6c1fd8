#!/usr/bin/env bash
# Everything that needs a Hopper GPU, in one command and without a network: tests, sanitizer, benchmark; a table at the end.
#
#   scripts/gpu_check.sh [--quick]        --quick leaves out racecheck, initcheck and synccheck
#
# Installs the wheel in dist/ where there is one, else builds without isolation (jaxlib's, CUTLASS's and nanobind's files must be there).
# PYTHON names the interpreter (default python3); it needs jax with a CUDA plugin, pytest, hypothesis and tqdm. Results: ci-output/gpu/.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
quick=${1:-}
root=$PWD
out=$root/ci-output/gpu
site=$out/site
rm -rf "$out" && mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
declare -a names results
failed=0

step() { # step NAME COMMAND...: runs it, keeps its log, notes how it went
  local name=$1 start=$SECONDS code
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$out/$name.log" | tail -n "${TAIL:-15}"
  code=${PIPESTATUS[0]}
  names+=("$name")
  if [ "$code" = 0 ]; then results+=("passed, $((SECONDS - start)) s"); else results+=("FAILED ($code), $((SECONDS - start)) s") && failed=1; fi
  return "$code"
}

install() {
  local wheel
  wheel=$(ls -t dist/jax_flashmla-*.whl 2>/dev/null | head -n 1)
  if [ -z "$wheel" ]; then
    "$python" -m pip wheel -q --no-deps --no-build-isolation --no-index -w "$out" . || return
    wheel=$(ls "$out"/jax_flashmla-*.whl)
  fi
  echo "installing $wheel"
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheel"
}

# One tool over the reduced grid, after it has found the mistake that is planted for it. XLA allocates plainly and launches
# every call by itself. No kernel is filtered out.
sanitize() {
  local command=(timeout 1500 compute-sanitizer --tool "$1" --error-exitcode 9)
  export XLA_FLAGS=--xla_gpu_enable_command_buffer=
  "${command[@]}" "$python" -P scripts/sanitize.py --plant "$1" >"$out/$1.planted.log" 2>&1
  if ! grep -qE '=========.* planted' "$out/$1.planted.log"; then
    cat "$out/$1.planted.log"
    echo "$1 did not find the planted mistake: its other reports mean nothing"
    return 1
  fi
  echo "found the planted mistake: $(grep -m 1 -E '=========.* planted' "$out/$1.planted.log")"
  "${command[@]}" "${@:2}" "$python" -P scripts/sanitize.py
}

if step install install; then
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  step main "$python" -P -m jax_flashmla --implementation cuda
  xdist=$("$python" -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
  # shellcheck disable=SC2086  # $xdist is two words or none
  step tests "$python" -P -m pytest -q -m gpu $xdist -p no:cacheprovider -p no:benchmark tests
  if command -v compute-sanitizer >/dev/null; then
    step memcheck sanitize memcheck
    if [ "$quick" != --quick ]; then
      step racecheck sanitize racecheck
      step initcheck sanitize initcheck
      step synccheck sanitize synccheck
    fi
  else
    echo "compute-sanitizer is not on PATH: left out"
  fi
  TAIL=40 step bench "$python" -P -m jax_flashmla.bench dense_decode --quick
  step plan "$python" -P -m jax_flashmla.bench schedule --quick
  step append "$python" -P -m jax_flashmla.bench append --quick
  step gather "$python" -P -m jax_flashmla.bench gather --quick
fi

echo
cat "$out/main.log" 2>/dev/null
echo
grep -h '^|' "$out/bench.log" "$out/plan.log" "$out/append.log" "$out/gather.log" 2>/dev/null
echo
printf '%-12s %s\n' step result
for i in "${!names[@]}"; do printf '%-12s %s\n' "${names[$i]}" "${results[$i]}"; done
exit "$failed"
