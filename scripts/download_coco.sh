#!/usr/bin/env bash
# Downloads COCO 2017 (pictures of train and val, annotations; 42 GB on the way, 21 GB in the end)
# and unpacks it. Stopped and run again it goes on where it was; done, it does nothing.
#   scripts/download_coco.sh /data/coco
#   scripts/download_coco.sh --only val,annotations /data/coco     # 2 GB, enough to judge with
#   SEGTRAIN_COCO_URL=https://mirror.example/coco scripts/download_coco.sh
# Exit codes: 0 done, 2 usage, 3 a wrong checksum, 5 disk or network, 143 SIGTERM.
set -euo pipefail

# The bucket behind images.cocodataset.org, under the name that its certificate is for; by its own
# name it answers over http only (https://github.com/traceopt-ai/traceml/pull/469).
base=${SEGTRAIN_COCO_URL:-https://s3.amazonaws.com/images.cocodataset.org}
base=${base%/}

usage='usage: scripts/download_coco.sh [--only train,val,annotations] [folder=coco]'
fail() { # code, message
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

only=train,val,annotations
folder=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage" && exit 0 ;;
    --only=*) only=${1#--only=} ;;
    --only) only=${2-} && shift "$(($# > 1))" ;;
    -*) fail 2 "no such option: $1; $usage" ;;
    *) if [ -n "$folder" ]; then fail 2 "one folder only; $usage"; else folder=$1; fi ;;
  esac
  shift
done
folder=${folder:-coco}
if [ "$folder" != / ]; then folder=${folder%/}; fi
[[ ,$only, =~ ^,((train|val|annotations),)+$ ]] || fail 2 "--only takes no '$only'; $usage"
for tool in curl unzip md5sum flock; do
  command -v $tool >/dev/null || fail 2 "$tool is not installed"
done

# COCO publishes none; these stand in ppdet/utils/download.py of PaddlePaddle/PaddleDetection, among
# others. $SEGTRAIN_COCO_MD5 names a file of others, for a mirror that has packed the archives anew.
checksums='f4bbac642086de4f52a3fdda2de5fa2c  annotations_trainval2017.zip
442b8da7639aecaf257c1dceb8ba8c80  val2017.zip
cced6f7f71b7629ddf16f17bbcfab6b2  train2017.zip'
if [ -n "${SEGTRAIN_COCO_MD5:-}" ]; then
  echo "checksums: $SEGTRAIN_COCO_MD5"
  checksums=$(cat "$SEGTRAIN_COCO_MD5") || fail 2 "cannot read \$SEGTRAIN_COCO_MD5"
fi

# A signal may come to this shell alone, so what takes long runs beside it and is ended with it.
# shellcheck disable=SC2329 # called by the traps
end_by_signal() { # exit code
  local child
  child=$(jobs -pr)
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  exit "$1"
}
trap 'end_by_signal 129' HUP
trap 'end_by_signal 130' INT
trap 'end_by_signal 143' TERM
beside() {
  "$@" &
  wait $!
}

size_of() { if [ -e "$1" ]; then wc -c <"$1"; else echo 0; fi; }

# What is under way lies in here, and of an archive that is done its checksum.
work=$folder/.download
mkdir -p "$work" || fail 5 "cannot make the folder $work"
exec 9>"$work/lock" || fail 5 "cannot write in $work"
flock -n 9 || fail 2 "another download into $folder is running"

# Sets what there is to know about an archive.
describe() { # train, val or annotations
  case $1 in
    annotations) zip=annotations_trainval2017.zip path=annotations place=annotations times=5 ;;
    *) zip=${1}2017.zip path=zips place=${1}2017 times=2 ;; # JPEGs do not get larger
  esac
  url=$base/$path/$zip
  part=$work/$zip.part
  unpacked=$work/$zip.unpacked
  marker=$work/$zip.md5
  md5=$(awk -v zip="$zip" '$2 == zip || $2 == "*" zip { print $1; exit }' <<<"$checksums")
  [[ $md5 =~ ^[0-9a-f]{32}$ ]] || fail 2 "no checksum of $zip in $SEGTRAIN_COCO_MD5"
}

is_done() { [ -d "$folder/$place" ] && [ "$(cat "$marker" 2>/dev/null)" = "$md5" ]; }

# Sets `length` to what the server says of an archive's.
ask_length() {
  local head=$work/$zip.head
  beside curl --fail --silent --show-error --location --head --connect-timeout 30 --retry 3 \
    --output "$head" "$url" || fail 5 "cannot reach $url; is there a network?"
  # A redirection has a length too; the last one counts.
  length=$(tr -d '\r' <"$head" | awk 'tolower($1) == "content-length:" { n = $2 } END { print n }')
  rm -f "$head"
  [[ $length =~ ^[0-9]+$ ]] || fail 5 "the server does not say how long $url is"
}

# Goes on with a partial file until it is whole.
download() {
  local before meter status tries=0
  meter=--no-progress-meter
  if [ -t 2 ]; then meter=--progress-bar; fi
  if [ "$(size_of "$part")" -gt "$length" ]; then rm "$part"; fi # of another archive
  while before=$(size_of "$part") && [ "$before" -lt "$length" ]; do
    echo "$zip: downloading from byte $before of $length"
    status=0
    # Not with --retry: curl would begin each time where it had found the file.
    beside curl --fail --location $meter --connect-timeout 30 --speed-limit 1000 \
      --speed-time 60 --continue-at - --output "$part" "$url" || status=$?
    case $status in
      0) ;;
      23) fail 5 "cannot write $part; is the disk full?" ;;
      33 | 36) rm -f "$part" ;; # the server cannot go on in the middle
    esac
    if [ "$(size_of "$part")" -gt "$before" ]; then
      tries=0
    elif [ $((tries += 1)) -ge 5 ]; then
      fail 5 "no more of $url comes (curl ended with $status); run this again to go on"
    else
      beside sleep $((2 ** tries))
    fi
  done
}

check() {
  echo "$zip: comparing its checksum"
  beside md5sum "$part" >"$work/$zip.sum" || fail 5 "cannot read $part"
  local found
  read -r found _ <"$work/$zip.sum"
  rm "$work/$zip.sum"
  if [ "$found" != "$md5" ]; then
    rm "$part"
    fail 3 "$url has the checksum $found, not $md5; it is deleted, run this again to load it anew"
  fi
}

# Aside first, so that what lies in its place is whole; unzip compares each file's own checksum.
unpack() {
  echo "$zip: unpacking"
  rm -rf "$unpacked"
  mkdir "$unpacked"
  beside unzip -q -o "$part" -d "$unpacked" || fail 5 "cannot unpack $part; is the disk full?"
  [ -d "$unpacked/$place" ] || fail 3 "there is no $place in $url"
}

# Moves it to where it belongs and leaves alone whatever is there already.
settle() {
  local target=$folder/$place left differing=()
  if ! [ -e "$target" ]; then
    mv "$unpacked/$place" "$target" || fail 5 "cannot write $target"
  else
    # Some versions of mv call it an error when there was something; what matters is compared below.
    find "$unpacked/$place" -type f -exec mv -n -t "$target" {} + || true
    while IFS= read -rd '' left; do
      cmp -s "$left" "$target/${left##*/}" || differing+=("$target/${left##*/}")
    done < <(find "$unpacked/$place" -type f -print0)
    if [ ${#differing[@]} -gt 0 ]; then
      fail 2 "${#differing[@]} of the files in $target are not COCO's, e.g. ${differing[0]}; move them away and run this again"
    fi
  fi
  rm -rf "$unpacked"
  echo "$md5" >"$marker"
  rm "$part"
}

# The small ones first: what does not work shows early.
todo=()
needed=0
declare -A lengths
for archive in annotations val train; do
  [[ ,$only, == *,$archive,* ]] || continue
  describe $archive
  if is_done; then
    echo "$folder/$place: done before"
    rm -f "$part" # left by a stop between the last two steps
  else
    ask_length
    lengths[$archive]=$length
    todo+=("$archive")
    needed=$((needed + length * times - $(size_of "$part")))
  fi
done
free=$(($(df -Pk "$folder" | awk 'NR == 2 { print $4 }') * 1024))
if [ "$needed" -gt "$free" ]; then
  fail 5 "$folder has $((free / 10 ** 9)) GB free and needs $((needed / 10 ** 9 + 1)) GB"
fi
for archive in "${todo[@]}"; do
  describe "$archive"
  length=${lengths[$archive]}
  download
  check
  unpack
  settle
  echo "$folder/$place: done"
done
echo "next: segtrain doctor $folder"
