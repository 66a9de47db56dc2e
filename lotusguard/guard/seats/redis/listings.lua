-- SPDX-License-Identifier: Apache-2.0
-- What a listing of one SFU room tells: RoomSeats.apply_listing and RoomSeats.listed_again in lotusguard/rules/room_seats.py.
-- Fields that are going to be used are read at once: a listing costs a few commands, however many people are in the call.

-- Those who joined first come first; those of whom the SFU does not say when count as the oldest.
local function by_age(present)
  local places = {}
  for place, who in ipairs(present) do places[who] = place end
  table.sort(present, function(a, b)
    local one, other = a.joined or 0, b.joined or 0
    if one ~= other then return one < other end
    return places[a] < places[b]
  end)
  return present
end

-- Read what is kept of those whom a listing shows.
local function read_present(alias, present, any_reserved)
  local names = {}
  for _, who in ipairs(present) do
    names[#names + 1] = 's' .. key_of(alias, who.sid)
    if any_reserved then names[#names + 1] = 'r' .. key_of(alias, who.identity) end
  end
  Store.fetch(names)
  ended.read()
end

-- Read what is kept of the users and identities of arrivals or holds.
local function read_users(alias, arrivals_or_holds)
  local names = {}
  for _, who in ipairs(arrivals_or_holds) do
    names[#names + 1] = 'u' .. who.user
    names[#names + 1] = 'c' .. who.user
    names[#names + 1] = 'n' .. key_of(alias, who.identity)
    names[#names + 1] = 'r' .. key_of(alias, who.identity)
  end
  Store.fetch(names)
end

-- Whether a listing says nothing new about a participant: they have a seat, and no unused token.
local function is_settled(alias, at, who, any_reserved)
  return Store.begins_with('s' .. at, 'present') and not ended.score(at)
    and not (any_reserved and reserved[key_of(alias, who.identity)])
end

-- Users whose time to arrive runs.
local function awaited_users()
  local names = {}
  for _, found in ipairs(due.up_to()) do
    if found[1]:sub(1, 1) == 'c' then names[found[1]:sub(2)] = true end
  end
  return names
end

local function note_listing(alias, limit, since)
  room.listed[alias] = since
  if not limit then room.unlimited_at = now end
end

-- End the sessions that a listing does not show.
local function end_missing(alias, there, since)
  local found = 0
  for at in pairs(there) do
    if Store.has('s' .. at) then found = found + 1 end
  end
  if found == (room.in_call[alias] or 0) then return end
  local names, missing = {}, {}
  for _, name in ipairs(Store.names('s')) do
    if not there[name:sub(2)] then names[#names + 1] = name end
  end
  for _, hold in ipairs(in_order(read_all(names))) do
    if hold.alias == alias and hold.began < since then missing[#missing + 1] = hold end
  end
  read_users(alias, missing)
  for _, hold in ipairs(missing) do move(hold, 'vanish') end
end

-- Returns whether it told nothing new, and nothing is undecided: then a listing that shows the same tells nothing either.
function Seats.apply_listing(alias, present, limit, since)
  local listed = room.listed[alias]
  if listed and since < listed then return false end  -- a later listing overtook it
  note_listing(alias, limit, since)
  local there, distinct, unsettled = {}, 0, {}
  local any_reserved, awaited = how_many(RESERVED) > 0, awaited_users()
  read_present(alias, present, any_reserved)
  for _, who in ipairs(present) do
    local at = key_of(alias, who.sid)
    if not there[at] then distinct = distinct + 1 end
    there[at] = true
    if not is_settled(alias, at, who, any_reserved) then
      unsettled[#unsettled + 1] = who
    elseif awaited[who.user] then
      has_arrived(who.user)
    end
  end
  read_users(alias, unsettled)
  for _, who in ipairs(by_age(unsettled)) do
    local at = key_of(alias, who.sid)
    local ended_at = ended.score(at)
    if ended_at and ended_at < since then ended.drop(at) end  -- the SFU was asked after that event, and says it is there
    local before = not listed and (not who.joined or who.joined <= room.unlimited_at)
    arrived(alias, who, not before and limit or nil, since)
  end
  end_missing(alias, there, since)
  for _, hold in ipairs(to_confirm(since)) do
    if hold.alias == alias or hold.alias == '' then move(hold, 'confirm') end
  end
  if limit then Seats.seat_failed_open(limit) end
  forget_ended()
  local undecided = how_many({'issued_expired', 'left', 'unseated', 'issued_unseated'}) > 0
  return #unsettled == 0 and not undecided and (room.in_call[alias] or 0) == distinct
end

-- Whether a listing tells nothing new if it shows the same as one that told nothing new when the holds had a version.
function Seats.is_same(alias, since, version)
  local listed = room.listed[alias]
  return room.version == version and listed ~= nil and since >= listed
end

-- A listing that tells nothing new.
function Seats.listed_again(alias, limit, since) note_listing(alias, limit, since) end
