#!/bin/sh
# Brings eth0 up and asks on it as a container does that configures itself:
#
#   ask.sh dhcp | dhcpv6 | router | take
#
# It fails if there is no answer, and configures nothing, but for take, which does
# what DHCP says. It is the script of both DHCP clients, too: it prints what they
# were told.
up() {
  ip link set eth0 up
  while ip -6 addr show dev eth0 | grep -q tentative; do sleep 0.1; done
}
case $1 in
dhcp) up && exec udhcpc -i eth0 -f -q -n -t 2 -T 1 -O mtu -O search -s "$0" ;;
take) TAKE=1 exec "$0" dhcp ;;
dhcpv6) up && exec unshare -m "$0" dhcpcd ;;
dhcpcd)
  mount -t tmpfs run /run
  mount -t tmpfs lib /var/lib/dhcpcd
  timeout 5 dhcpcd -6 -T -B -c "$0" eth0 | grep dhcp6
  ;;
router) up && exec rdisc6 -1 -r 1 eth0 ;;
bound)
  env | sort | grep -E '^(ip|mask|mtu|router|dns|search|hostname|opt81)='
  [ -z "$TAKE" ] || ip -batch - <<EOF
addr add $ip/$mask dev eth0
link set eth0 mtu $mtu
route add default via $router
EOF
  ;;
*) env | sort | grep ^new_dhcp6_ || true ;;
esac
