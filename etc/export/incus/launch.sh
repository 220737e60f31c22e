#!/bin/sh
# Imports this group's images into Incus and launches the instances, each with its address.
#
# NETWORK=NAME: a network that is there; else `nocloud` is made. On a cluster a bridge is each member's own: where the
# instances are to reach each other across members, give an OVN network with @subnet@.1/24. INCUS=lxc: for LXD.
set -eu
cd "$(dirname "$0")"
incus=${INCUS:-incus} network=${NETWORK:-nocloud}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

if ! "$incus" network show "$network" >/dev/null 2>&1; then
    for member in $("$incus" cluster list --format csv --columns n 2>/dev/null); do
        "$incus" network create "$network" --target "$member"
    done
    "$incus" network create "$network" ipv4.address=@subnet@.1/24 ipv4.nat=true ipv6.address=none
fi

# launch NAME INSTANCE ADDRESS MAC MB CPUS GB CSM SECUREBOOT
launch() {
    cp "$1.metadata.yaml" "$temporary/metadata.yaml"
    tar -C "$temporary" -czf "$temporary/$1.tar.gz" metadata.yaml
    "$incus" image import "$temporary/$1.tar.gz" "$1_0.qcow2" --alias "@group@-$1"
    "$incus" init "@group@-$1" "$2" --vm --network "$network" -d "root,size=${7}GiB" -c "limits.memory=${5}MiB" \
        -c "limits.cpu=$6" -c "security.csm=$8" -c "security.secureboot=$9"
    "$incus" config device set "$2" eth0 "ipv4.address=$3" "hwaddr=$4"
}

%vm %bios launch @name@ @host@ @address@ @mac@ @mem@ @cpu@ @gb@ true false
%vm %uefi launch @name@ @host@ @address@ @mac@ @mem@ @cpu@ @gb@ false false
%vm %secure launch @name@ @host@ @address@ @mac@ @mem@ @cpu@ @gb@ false true
%vm %fresh "$incus" config device add @host@ cloud-init disk source=cloud-init:config
%vm %fresh "$incus" config set @host@ "cloud-init.user-data=$(cat user-data)"
%vm "$incus" start @host@
