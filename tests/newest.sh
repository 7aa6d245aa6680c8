#!/bin/sh
# A newer Slurm than this machine's, as Debian has it: a chroot of Debian testing (Slurm 26.05, with pyslurm built for
# it), or with SUITE=trixie of Debian 13 (24.11, for which PyPI has no pyslurm).
#
#   tests/newest.sh build        make the chroot where it is missing (a minute or two, about 900 MB; root; needs mmdebstrap)
#   tests/newest.sh there        succeeds if the chroot exists
#   tests/newest.sh run CMD...   run a command in it, in this clone; it, and all that it starts, is gone afterwards
#
# The chroot lies in the cache directory of the user and is never changed by a run: /tmp and /run are made anew each
# time, and this clone is read-only there. It is made again when this file has changed.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
suite=${SUITE:-testing}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/rms
root=$cache/newest-$suite-$(sha256sum "$here/tests/newest.sh" | cut -c1-12)

# enter ROOT CMD...: in namespaces of its own, so that mounts and processes end with the command.
enter() {
    into=$1
    shift
    unshare --mount --pid --fork --kill-child --mount-proc -- sh -euc '
        into=$1 here=$2
        shift 2
        mount --make-rprivate /
        mount --bind "$into" "$into"
        mount -t proc proc "$into/proc"
        mount --rbind /dev "$into/dev"
        mount --rbind /sys "$into/sys"
        mount -t tmpfs -o mode=1777 tmpfs "$into/tmp"
        mount -t tmpfs -o mode=755 tmpfs "$into/run"
        mount --bind -o ro "$here" "$into/rms"
        for file in /etc/hosts /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt; do
            [ ! -e "$file" ] || mount --bind "$file" "$into$file"
        done
        # No exec: pid 1 of a namespace reaps what daemons leave behind, and a shell that waits does that.
        chroot "$into" env -i PATH=/opt/rms/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
            PYTHONDONTWRITEBYTECODE=1 ${CI:+CI="$CI"} ${PIP_CERT:+PIP_CERT=/etc/ssl/certs/ca-certificates.crt} \
            sh -c '\''cd /rms && exec "$@"'\'' sh "$@"
        exit $?
    ' sh "$into" "$here" "$@"
}

build() {
    mkdir -p "$cache"
    new=$(mktemp -d "$cache/making.XXXXXX")
    trap 'rm -rf --one-file-system "$new"' EXIT
    chmod 755 "$new"
    # The mirrors' Release file may be past its date; its signature is checked all the same. No package starts a daemon.
    mmdebstrap --quiet --mode=root --variant=apt --components=main \
        --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='APT::Install-Recommends "false"' \
        --setup-hook='mkdir -p "$1/usr/sbin"; printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"' \
        --include=slurm-wlm,slurm-wlm-basic-plugins,slurm-client,munge,libslurm-dev,python3-dev,python3-venv,gcc,libc6-dev,ca-certificates,procps,util-linux,bsdutils,mount \
        "$suite" "$new"
    mkdir -p "$new/rms" "$new/opt"
    : >"$new/etc/resolv.conf"
    enter "$new" env SUITE="$suite" sh -eu tests/newest.sh inside
    mv -T "$new" "$root"
    # What earlier versions of this file have made; others may still use it today.
    find "$cache" -mindepth 1 -maxdepth 1 \( -name 'newest-*' -o -name 'making.*' \) ! -path "$root" -mtime +7 -exec rm -rf --one-file-system {} +
}

# Within the chroot: a Python with what the tests need, RMS itself, and pyslurm if it can be built.
inside() {
    # The tests' users. For sbatch --export slurmd of 26.05 logs them in.
    sed -i 's#^\(nobody\|games\):\(.*\):/usr/sbin/nologin$#\1:\2:/bin/sh#' /etc/passwd
    python3 -m venv /opt/rms
    pip install --quiet --disable-pip-version-check -c constraints.txt \
        filelock pytest hypothesis nvidia-ml-py lupa setuptools wheel Cython packaging
    site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo /rms >"$site/rms.pth"
    printf '#!/opt/rms/bin/python3\nimport sys\nfrom rms.cli import main\nsys.exit(main())\n' >/opt/rms/bin/rms
    chmod 755 /opt/rms/bin/rms
    [ "$suite" = testing ] || return 0
    # pyslurm 25.11 says that it is for Slurm 25.11: the copied header says so too. The rest of the flags is what has
    # been renamed since. One day this pair will not fit any more; then there is no pyslurm here, and the tests say so.
    cp -r /usr/include/slurm /tmp/slurm
    sed -i 's/^#define SLURM_VERSION_NUMBER .*/#define SLURM_VERSION_NUMBER 0x190b00/' /tmp/slurm/slurm_version.h
    mkdir /tmp/shim && mv /tmp/slurm /tmp/shim/slurm
    libraries=$(dirname "$(find /usr/lib -name 'libslurm.so' | head -n1)")
    SLURM_LIB_DIR=$libraries SLURM_INCLUDE_DIR=/tmp/shim \
        CFLAGS="-O1 -g0 -DSLURM_BACKWARD_COMPAT -Dslurm_free_ctl_conf=slurm_free_conf -DESLURM_ERROR_ON_DESC_TO_RECORD_COPY=ESLURM_INVALID_JOB_ID -Wno-error=implicit-function-declaration" \
        pip install --no-deps --no-build-isolation --no-binary :all: pyslurm==25.11.2 >/tmp/pyslurm.log 2>&1 || {
        tail -n 20 /tmp/pyslurm.log
        echo "rms: pyslurm can't be built for this Slurm: only the commands are tested here"
    }
}

case ${1-} in
build) [ -d "$root" ] || build ;;
there) [ -d "$root" ] ;;
inside) inside ;;
run)
    shift
    touch -c "$root"
    [ -d "$root" ] || { echo "rms: there is no chroot yet: tests/newest.sh build" >&2; exit 1; }
    enter "$root" "$@"
    ;;
*)
    sed -n '2,11p' "$0"
    exit 2
    ;;
esac
