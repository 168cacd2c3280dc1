#!/bin/bash
# bash tests/systemd_container.sh DIR: relay and poller as their own `unit`s say, under a real systemd (as root, about a minute; by hand).
# Makes a Debian tree in DIR (debootstrap), boots it with systemd-nspawn, runs a calculation with CalculiX and with memory that is written and
# executed, restarts the poller meanwhile, and shows how it went. Needs debootstrap and systemd-container.
set -e
here=$(cd "$(dirname "$0")/.." && pwd) tree=$1
[ -n "$tree" ] || { sed -n 2,5p "$0"; exit 64; }
if [ ! -e "$tree/made" ]; then
    mirror=$(grep -hoE "https?://[^ ]+" /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1)
    debootstrap --variant=minbase --include=systemd,systemd-sysv,python3-minimal,libpython3-stdlib,procps,calculix-ccx,dbus bookworm "$tree" "$mirror" >/dev/null
    touch "$tree/made"
fi
mkdir -p "$tree/opt/mi"
cp "$here"/mi_*.py "$tree/opt/mi/"
rm -f "$tree/result"
cat >"$tree/etc/mi.ini" <<'E'
[Server]
portnumber = 8443
[RemoteSites]
remote_site_ids = u
[u]
commands = solve
[poller]
site = u
url = http://127.0.0.1:8443
token_file = /etc/mi.token
calc_base = /var/lib/mi_poller
[command solve]
match = solve
argv = /opt/mi/solve.sh
E
cat >"$tree/opt/mi/solve.sh" <<'E'
#!/bin/sh
python3 - <<'P'
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\xb8\x2a\x00\x00\x00\xc3" if __import__("os").uname().machine == "x86_64" else b"\x40\x05\x80\x52\xc0\x03\x5f\xd6")
print("written and executed:", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_int.from_buffer(code)))())
P
sleep 8
ccx beam
E
cat >"$tree/opt/mi/beam.inp" <<'E'
*NODE,NSET=N
1,0,0,0
2,1,0,0
3,1,1,0
4,0,1,0
5,0,0,1
6,1,0,1
7,1,1,1
8,0,1,1
*ELEMENT,TYPE=C3D8,ELSET=E
1,1,2,3,4,5,6,7,8
*MATERIAL,NAME=M
*ELASTIC
210000,0.3
*SOLID SECTION,ELSET=E,MATERIAL=M
*BOUNDARY
1,1,3
2,1,3
3,1,3
4,1,3
*STEP
*STATIC
*CLOAD
5,3,10
6,3,10
7,3,10
8,3,10
*NODE PRINT,NSET=N
U
*END STEP
E
cat >"$tree/opt/mi/go.sh" <<'E'
#!/bin/bash
exec >/result 2>&1
useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin mi_distcomp
install -d -o mi_distcomp -m 0700 /var/lib/mi_distcomp /var/lib/mi_poller /tmp/wf
as() { setpriv --reuid=mi_distcomp --regid=mi_distcomp --clear-groups "$@"; }
as python3 /opt/mi/mi_dicomapi.py token issue alice --ini /etc/mi.ini >/etc/mi.token
chown mi_distcomp /etc/mi.token; chmod 600 /etc/mi.token
for script in mi_dicomapi mi_system_remote; do python3 /opt/mi/$script.py unit --ini /etc/mi.ini >/etc/systemd/system/$script.service; done
echo "verify says: $(systemd-analyze verify /etc/systemd/system/mi_*.service 2>&1)"
systemctl daemon-reload; systemctl start mi_dicomapi mi_system_remote; sleep 2
cd /tmp/wf; as cp /opt/mi/beam.inp .
as python3 /opt/mi/mi_system_wf.py run u solve --in beam.inp --out beam.dat --url http://127.0.0.1:8443 --token-file /etc/mi.token & module=$!
sleep 4; systemctl restart mi_system_remote; wait $module; echo "exit code $?"
tail -n 4 beam.dat
journalctl --no-pager -u mi_dicomapi -u mi_system_remote
for script in mi_dicomapi mi_system_remote; do systemd-analyze security --no-pager $script | tail -n 1; done
systemctl poweroff
E
chmod -R a+rX,u+x "$tree/opt/mi"; chmod 755 "$tree"/opt/mi/*.sh
printf '[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/opt/mi/go.sh\n' >"$tree/etc/systemd/system/go.service"
mkdir -p "$tree/etc/systemd/system/multi-user.target.wants"
ln -sf ../go.service "$tree/etc/systemd/system/multi-user.target.wants/go.service"
timeout 120 systemd-nspawn -q -b --register=no --keep-unit --private-network -D "$tree" </dev/null >/dev/null 2>&1 || true
cat "$tree/result"
grep -q "^exit code 0" "$tree/result" && grep -q "written and executed: 42" "$tree/result" && grep -q "^verify says: $" "$tree/result"
