#!/usr/bin/env bash
# Boots an emulated aarch64 machine and attacks the code sandbox in it: all attacks of tests/tools/sandbox, on both
# backends, in calls and in sessions, as root and as a normal user. An attack that is not held, which under
# emulation mostly means that it ran out of time, is tried once more with ten times the time.
#
#   scripts/aarch64_sandbox.sh [KERNEL [COMMAND]]
#     KERNEL   arm64 (pages of 4 KiB, the default) or arm64-16k
#     COMMAND  for a shell in the checkout there instead: "python3 -m pytest tests/tools/sandbox -k sessions"
#
# Debian, as root, with `apt-get install qemu-system-arm mmdebstrap kmod e2fsprogs cpio xz-utils`; downloads an arm64
# kernel and Python by apt and numpy, sympy, pytest and hypothesis by pip; 2 GB in BUILD, 4 GB of memory. An
# hour or more. The exit code is that of the command.
set -euo pipefail
cd "$(dirname "$0")/.."
kernel=${1:-arm64}
build=${BUILD:-/tmp/opd-env-aarch64}
attacks='python3 /attack.py && python3 tests/tools/sandbox/sandbox_as_user.py /attack.py'
command=${2:-$attacks}
root=$build/$kernel
mkdir -p "$build"

if [ ! -e "$root.ready" ]; then
  rm -rf "$root"
  mmdebstrap --variant=extract --arch=arm64 trixie "$root" \
    --include="linux-image-$kernel,linux-libc-dev,python3,libstdc++6,bash,coreutils,mount,libc-bin,procps,busybox-static"
  pip download --quiet --dest "$build/wheels" --only-binary=:all: --python-version 3.13 --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    numpy sympy pytest pytest-timeout hypothesis jsonschema
  for wheel in "$build"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$root/usr/local/lib/python3.13/dist-packages"
  done
  printf 'root:x:0:0::/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n' >"$root/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
  # An initial file system with what the root's own needs: the sandbox's pivot_root does not work in the first one.
  first=$build/first
  rm -rf "$first"
  mkdir -p "$first"/{bin,modules,root,proc,dev}
  cp "$root/usr/bin/busybox" "$first/bin/"
  version=$(ls "$root/usr/lib/modules")
  depmod -b "$root" "$version"
  for module in virtio_blk ext4; do modprobe -d "$root" -S "$version" --show-depends "$module"; done |
    awk '$1 == "insmod" && !seen[$2]++ {print $2}' | nl -w 2 -n rz |
    while read -r number path; do xz -dc "$path" >"$first/modules/$number.ko"; done
  cat >"$first/init" <<'EOF'
#!/bin/busybox sh
alias b=/bin/busybox
b mount -t devtmpfs dev /dev
for module in /modules/*; do b insmod $module; done
b mount -t ext4 /dev/vda /root && b mount --move /dev /root/dev && exec /bin/busybox switch_root /root /bin/bash /start
EOF
  chmod +x "$first/init"
  (cd "$first" && find . | cpio -o -H newc --quiet | gzip -1) >"$root.initrd"
  mv "$root"/boot/vmlinuz-* "$root.kernel"
  rm -rf "$root"/usr/lib/modules "$root"/usr/share/{doc,man,locale}
  touch "$root.ready"
fi

cat >"$root/attack.py" <<'EOF'
"""All attacks; those that are not held once more with ten times the time. Exits with 1 if one is still not held."""
import dataclasses, os, sys
sys.path.insert(0, "tests/tools/sandbox")
import sandbox_harness
from opd_env.tools.sandbox import Level, open_sandbox, slots

left = 0
for level in ("namespaces", "landlock"):
    open_sandbox(level).close()  # its self-test
    harness = sandbox_harness.Harness(Level(level))
    for mode in sandbox_harness.MODES:
        for attack in sandbox_harness.ALL_ATTACKS:
            name = f"uid {os.getuid()}, {level}, {mode}: {attack.name}"
            if found := harness.run(attack, mode):
                print(f"{name}: once more after {found}", flush=True)
                limits, grace_s = attack.limits, slots.GRACE_S
                slow = dataclasses.replace(limits, wall_s=limits.wall_s * 10, cpu_s=limits.cpu_s * 10)
                slots.GRACE_S = 60.0
                found = harness.run(dataclasses.replace(attack, limits=slow), mode)
                slots.GRACE_S = grace_s
            left += bool(found)
            print(f"{name}: {found or 'held'}", flush=True)
    harness.close()
print(f"uid {os.getuid()}: {left} attacks were not held")
sys.exit(left > 0)
EOF
rm -rf "$root/opt/opd-env"
mkdir -p "$root/opt/opd-env"
git ls-files -z | grep -zv '\.safetensors$' | tar --null -T - -c | tar -x -C "$root/opt/opd-env"
printf '%s\n' "$command" >"$root/command"
cat >"$root/start" <<'EOF'
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 OMP_NUM_THREADS=1 PYTHONPATH=/opt/opd-env
mount -t proc proc /proc; mount -t sysfs sys /sys; mkdir -p /dev/shm
for folder in /tmp /run /dev/shm; do mount -t tmpfs tmpfs $folder; done
busybox ifconfig lo 127.0.0.1 up; ldconfig
cd /opt/opd-env
# Compiled once, as a zygote writes no files and may take a minute to start.
python3 -c 'import opd_env.tools.sandbox.guest.zygote as z, importlib as i; [*map(i.import_module, [*z._MODULES.split(), "numpy.random", "numpy.polynomial", "sympy", "pytest", "hypothesis"])]'
echo "$(uname -srvm), pages of $(getconf PAGESIZE) bytes, $(python3 --version)"
bash /command; echo "exit code $?"; echo o >/proc/sysrq-trigger; sleep 60
EOF
rm -f "$root.img"
mke2fs -q -t ext4 -d "$root" "$root.img" 1500M
qemu-system-aarch64 -M virt -cpu max,pauth-impdef=on -accel tcg,thread=multi -smp 2 -m 3G -nic none -no-reboot \
  -kernel "$root.kernel" -initrd "$root.initrd" -append "console=ttyAMA0 panic=-1 quiet" \
  -drive "file=$root.img,format=raw,if=virtio" -display none -monitor none -serial stdio </dev/null |
  tee "$root.log"
grep -q '^exit code 0' "$root.log"
