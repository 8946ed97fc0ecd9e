#!/bin/sh
# Three nodes with TLS under systemd on this machine, as root: certificates, a configuration each, pontoon@1 to pontoon@3.
# On three machines do the same with one node each and --host NAME. Run it once; what is there already it does not replace.
set -eu
etc=/etc/pontoon

id pontoon >/dev/null 2>&1 || useradd --system --home-dir /var/lib/pontoon --shell /usr/sbin/nologin pontoon
install -d -m 0750 -o root -g pontoon "$etc"

# The authority's key is needed to make certificates and for nothing else: keep it elsewhere afterwards.
[ -e "$etc/certs/ca.pem" ] || pontoon certs init --dir "$etc/certs" --cluster main
for n in 1 2 3; do
  [ -e "$etc/certs/node-$n.pem" ] || pontoon certs node --dir "$etc/certs" --id "$n" --host 127.0.0.1
done
[ -e "$etc/certs/operator-admin.pem" ] || pontoon certs client --dir "$etc/certs" --role operator --name admin
# The nodes read theirs; an operator's key is for whoever is one.
chgrp pontoon "$etc/certs" "$etc"/certs/ca.pem "$etc"/certs/node-*
chmod 0750 "$etc/certs"
chmod 0640 "$etc"/certs/node-*.key

for n in 1 2 3; do
  [ -e "$etc/$n.toml" ] || {
    echo "listen = \"127.0.0.1:740$((n - 1))\""
    [ "$n" = 1 ] || echo 'join = "127.0.0.1:7400"'
    echo '[tls]'
    echo "cert = \"$etc/certs/node-$n.pem\""
    echo "key = \"$etc/certs/node-$n.key\""
    echo "ca = \"$etc/certs/ca.pem\""
  } >"$etc/$n.toml"
done

systemctl daemon-reload
# Each start returns when the node serves.
for n in 1 2 3; do systemctl enable --now "pontoon@$n"; done
