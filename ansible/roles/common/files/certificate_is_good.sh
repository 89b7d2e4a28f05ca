#!/bin/sh
# CA CERTIFICATE KEY DAYS NAMES: whether the certificate lasts for DAYS yet, is the CA's and the key's, and for
# NAMES (DNS:host,IP:address,...).
set -eu
openssl x509 -in "$2" -noout -checkend "$(($4 * 86400))" >/dev/null
openssl verify -CAfile "$1" "$2" >/dev/null
[ "$(openssl x509 -in "$2" -noout -pubkey)" = "$(openssl pkey -in "$3" -pubout)" ]
found=$(openssl x509 -in "$2" -noout -ext subjectAltName 2>/dev/null | tail -n +2 | sed 's/IP Address:/IP:/g' | tr -d ' \n')
[ "$found" = "$5" ]
