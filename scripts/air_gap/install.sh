#!/bin/sh
# Install fedtailor from the folder that this file lies in. Nothing is fetched, and no root is needed.
#   sh install.sh FOLDER [KEY.pub]
# KEY.pub is the public key of whoever made the bundle, as you got it by another way. Without it the bundle's own is used,
# and its fingerprint is printed: compare it by telephone. PYTHON=… names another python3.
#
# The sums are verified first, then the wheels are installed by their hashes, then the signature over the sums is
# verified by what was installed; if that fails, FOLDER is removed. Who can change this file can change what it checks: to
# verify before you run anything of this folder, with openssl 3 of your own:
#   (printf 'fedtailor/bundle/1\n'; cat SHA256SUMS) > /tmp/signed
#   openssl pkeyutl -verify -pubin -inkey KEY.pub -rawin -in /tmp/signed -sigfile SHA256SUMS.sig && sha256sum -c SHA256SUMS
set -eu

refuse() {
    echo "install.sh: $*" >&2
    exit 1
}

[ $# -eq 1 ] || [ $# -eq 2 ] || refuse "usage: sh install.sh FOLDER [KEY.pub]"
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
key=$here/bundle.pub
if [ $# -eq 2 ]; then
    [ -f "$2" ] || refuse "$2 is not a file; KEY.pub is the public key of whoever made the bundle"
    key=$(CDPATH='' cd -- "$(dirname -- "$2")" && pwd)/$(basename -- "$2")
fi
[ ! -e "$1" ] || refuse "$1 exists; name a folder that does not, it will be made"

(cd "$here" && sha256sum --check --strict --quiet SHA256SUMS) || refuse "a file is not what SHA256SUMS says; get the bundle again"

wanted=$(sed -n 's/^ *"python": "\(.*\)",*$/\1/p' "$here/MANIFEST.json")
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || refuse "$python does not run; set PYTHON"
[ "$found" = "$wanted" ] || refuse "this bundle is for Python $wanted, and $python is $found; set PYTHON"

umask 022
trap 'rm -rf -- "$1"' EXIT
trap 'exit 1' HUP INT TERM
"$python" -m venv "$1" || refuse "$python cannot make a virtual environment (on Debian: the package python3-venv)"
# No setting of this host's pip counts: no index, no constraint, no other folder of wheels.
PIP_CONFIG_FILE=/dev/null "$1/bin/python" -m pip --isolated --quiet --disable-pip-version-check install --no-cache-dir --no-index \
    --find-links "$here/wheels" --require-hashes -r "$here/requirements.txt" || refuse "the wheels could not be installed"
"$1/bin/python" -I "$here/verify.py" "$key" || refuse "SHA256SUMS is not signed by that key; $1 is removed"
trap - EXIT
echo "fedtailor is installed: $1/bin/fedtailor --help"
