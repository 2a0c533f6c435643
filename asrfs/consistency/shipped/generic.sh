#!/bin/sh
# Stops a service for the time of an application-consistent point, or before the machine is handed over to another
# site (planned failover), and starts it again.
#
#   asrfs hooks add pre "generic myapp.service" --timeout 60s
#   asrfs hooks add post "generic myapp.service" --timeout 60s
#   asrfs hooks add handover "generic myapp.service" --timeout 60s
#
# A service that can flush by itself is better served by a script of your own. What a hook is told: ASRFS_MACHINE,
# ASRFS_POINT (id), ASRFS_CONSISTENCY, ASRFS_PHASE (pre or post), and after the point ASRFS_FAILED (empty, or why); of
# a handover ASRFS_FAILOVER (id) and ASRFS_PHASE (handover or take-back).
set -eu
unit=${1:?the name of a systemd unit}
case $ASRFS_PHASE in
pre | handover) exec systemctl stop "$unit" ;;
post | take-back) exec systemctl start "$unit" ;;
esac
