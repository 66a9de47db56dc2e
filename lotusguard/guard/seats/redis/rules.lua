-- SPDX-License-Identifier: Apache-2.0
-- The seats of one Matrix room: the rules of lotusguard/rules/room_seats.py, step by step, on the table TABLE that is
-- generated from lotusguard/rules/seats.py. Tests run both side by side. Times are seconds.
--
-- A room is {unlimited_at, touched, vacated, holds = {hold…}, listed = {alias → time}, ended = {session → time},
-- chains = {user → {expires, asked}}, exempt = {user → true}}. A hold has the fields of lotusguard.rules.seats.Hold, and
-- for a pending one "lease": when it ends unless its guard renews it.

local COUNTED = {'takes_seat', 'full', 'owns_seat', 'removes'}
local ENDINGS = {leave = true, vanish = true, expire = true}
local NOBODY = {holds = 0, takes_seat = 0, full = 0, owns_seat = 0, removes = 0, exempt = false}
local Seats = {}

local function key_of(alias, name) return alias .. '\0' .. name end

-- The identity of a token. One that cannot be read gets one of its own, so that it replaces no other hold.
local function identity_of(identity, hold_id) return identity ~= '' and identity or hold_id end

-- What is derived from the holds. "list" has holes: it keeps the order in which the holds got where they are.
local room, list, last, users, total, sessions, sessions_of, reserved, pending, aliases, alias_count

-- counting ---------------------------------------------------------------------------------------------------------

local function user_of(name) return users[name] or NOBODY end

local function add_up(user, rules, by)
  for i = 1, #COUNTED do
    local column = COUNTED[i]
    if rules[column] then
      local before = user[column]
      user[column] = before + by
      if not user.exempt and (before == 0 or before + by == 0) then total[column] = total[column] + by end
    end
  end
end

local function count(hold)
  if not aliases[hold.alias] then
    aliases[hold.alias] = 0
    alias_count = alias_count + 1
  end
  aliases[hold.alias] = aliases[hold.alias] + 1
  local user = users[hold.user]
  if not user then
    user = {holds = 0, takes_seat = 0, full = 0, owns_seat = 0, removes = 0,
            exempt = room.exempt[hold.user] == true}
    users[hold.user] = user
  end
  user.holds = user.holds + 1
  add_up(user, TABLE[hold.state], 1)
end

local function uncount(hold)
  aliases[hold.alias] = aliases[hold.alias] - 1
  if aliases[hold.alias] == 0 then
    aliases[hold.alias] = nil
    alias_count = alias_count - 1
  end
  local user = users[hold.user]
  user.holds = user.holds - 1
  add_up(user, TABLE[hold.state], -1)
end

local function forget(name)
  if user_of(name).holds == 0 then
    users[name] = nil
    room.exempt[name] = nil
  end
end

local function owns_seat(name)
  local user = user_of(name)
  return user.owns_seat > 0 or user.exempt
end

-- where holds are --------------------------------------------------------------------------------------------------

local function append(hold)
  last = last + 1
  hold.place = last
  list[last] = hold
end

local function holds_where(wanted)
  local found = {}
  for i = 1, last do
    if list[i] and wanted(list[i]) then found[#found + 1] = list[i] end
  end
  return found
end

local move

local function put_session(hold)
  sessions[key_of(hold.alias, hold.sid)] = hold
  local key = key_of(hold.alias, hold.identity)
  sessions_of[key] = (sessions_of[key] or 0) + 1
  append(hold)
  count(hold)
end

-- What is reserved for a user, in the order in which it got there.
local function reserved_for(name)
  return holds_where(function(hold)
    return hold.user == name and hold.state ~= 'pending' and not TABLE[hold.state].in_call
  end)
end

local function put_reserved(key, hold)
  count(hold)  -- first, so that the user is known throughout
  local older = reserved[key]
  if older then move(older, 'replace', 0) end
  reserved[key] = hold
  append(hold)
  if user_of(hold.user).holds > RESERVED_PER_USER then
    local of_user = reserved_for(hold.user)
    if #of_user > RESERVED_PER_USER then move(of_user[1], 'replace', 0) end
  end
end

local function take_out(hold)
  list[hold.place] = nil
  local key = key_of(hold.alias, hold.identity)
  if hold.state == 'pending' then
    pending[hold.id] = nil
  elseif TABLE[hold.state].in_call then
    sessions[key_of(hold.alias, hold.sid)] = nil
    sessions_of[key] = sessions_of[key] > 1 and sessions_of[key] - 1 or nil
  else
    reserved[key] = nil
  end
end

function move(hold, event, at)
  local rules = TABLE[hold.state]
  local after = rules.moves[event]
  if after == nil then error('a hold that is ' .. hold.state .. ' cannot ' .. event) end
  take_out(hold)
  uncount(hold)
  if ENDINGS[event] then room.vacated = math.max(room.vacated, at) end
  if after then
    hold.state = after
    local key = key_of(hold.alias, hold.identity)
    if TABLE[after].in_call then
      if event == 'arrive' then hold.began = at end
      put_session(hold)
    elseif not (rules.in_call and (reserved[key] or sessions_of[key])) then
      -- else the identity has a newer token or session, which keeps the seat
      if event == 'leave' or event == 'vanish' then
        hold.began = at
        hold.expires = event == 'leave' and at or at + RECONNECT_WINDOW
      end
      put_reserved(key, hold)
    end
  end
  forget(hold.user)
end

-- a room from its stored form, and back
function Seats.open(stored)
  room, list, last, users, sessions, sessions_of, reserved, pending = stored, {}, 0, {}, {}, {}, {}, {}
  aliases, alias_count = {}, 0
  total = {takes_seat = 0, full = 0, owns_seat = 0, removes = 0}
  for _, hold in ipairs(stored.holds) do
    append(hold)
    count(hold)
    local key = key_of(hold.alias, hold.identity)
    if hold.state == 'pending' then
      pending[hold.id] = hold
    elseif TABLE[hold.state].in_call then
      sessions[key_of(hold.alias, hold.sid)] = hold
      sessions_of[key] = (sessions_of[key] or 0) + 1
    else
      reserved[key] = hold
    end
  end
end

function Seats.close()
  room.holds = holds_where(function() return true end)
  for _, hold in ipairs(room.holds) do hold.place = nil end
  return room
end

local function expires_before(a, b)
  if a.expires ~= b.expires then return a.expires < b.expires end
  return a.place < b.place
end

-- Let everything expire that has. Returns whether a request in flight ended because its guard did not renew it.
function Seats.advance(now)
  local due, lapsed = {}, {}
  for i = 1, last do
    local hold = list[i]
    if hold then
      if hold.state == 'pending' then
        if hold.lease and hold.lease <= now then lapsed[#lapsed + 1] = hold end
      elseif TABLE[hold.state].moves.expire ~= nil and hold.expires <= now then
        due[#due + 1] = hold
      end
    end
  end
  table.sort(due, expires_before)
  for _, hold in ipairs(due) do move(hold, 'expire', hold.expires) end
  for _, hold in ipairs(lapsed) do move(hold, 'release', now) end
  return #lapsed > 0
end

-- a join -----------------------------------------------------------------------------------------------------------

local function known(hold_id)
  if pending[hold_id] then return pending[hold_id] end
  for i = 1, last do
    if list[i] and list[i].id == hold_id then return list[i] end
  end
end

function Seats.take(now, hold_id, user, limit, alias, exempt, slots, lease)
  room.touched = now
  if known(hold_id) then return nil end  -- asked again, because the answer was lost
  if slots and not aliases[alias] and alias_count >= slots then return 'too_many_slots' end
  if not limit then
    room.unlimited_at = now
  elseif not exempt and total.takes_seat >= limit and not owns_seat(user) then
    return total.full >= limit and 'full' or 'seat_pending'
  end
  local hold = {id = hold_id, user = user, state = 'pending', alias = alias, identity = '', sid = '', began = now,
                expires = 0, lease = lease}
  pending[hold_id] = hold
  append(hold)
  count(hold)
  if exempt then Seats.exempt(now, user) end
end

local function time_to_arrive(user, now, ttl)
  local chain = room.chains[user]
  if not chain or chain.asked + ttl < now then
    chain = {expires = now + ttl}
    room.chains[user] = chain
  end
  chain.asked = now
  return chain.expires
end

local function reserve(hold, alias, identity, now, ttl, device)
  local expires = time_to_arrive(hold.user, now, ttl)
  hold.state = TABLE[hold.state].moves[expires <= now and 'issue_late' or 'issue']
  hold.alias, hold.identity, hold.began, hold.expires, hold.lease = alias, identity, now, expires, nil
  hold.device = device
  put_reserved(key_of(alias, identity), hold)
  return hold
end

function Seats.issue(now, hold_id, alias, identity, ttl, device)
  local hold = pending[hold_id]
  if not hold then return known(hold_id) end
  take_out(hold)
  uncount(hold)
  return reserve(hold, alias, identity_of(identity, hold_id), now, ttl, device)
end

function Seats.issue_without_seat(now, hold_id, user, alias, identity, ttl, device)
  local hold = known(hold_id)
  if hold then return hold end
  identity = identity_of(identity, hold_id)
  hold = {id = hold_id, user = user, state = 'pending', alias = alias, identity = identity, sid = '', began = now,
          expires = 0, device = device}
  if owns_seat(user) then return reserve(hold, alias, identity, now, ttl, device) end
  hold.state, hold.expires = 'issued_unseated', time_to_arrive(user, now, ttl)
  put_reserved(key_of(alias, identity), hold)
  return hold
end

function Seats.release(now, hold_id)
  if not pending[hold_id] then return false end
  move(pending[hold_id], 'release', now)
  return true
end

-- the call ---------------------------------------------------------------------------------------------------------

-- Whether a participant without a seat may have one. Before the first listing nobody can tell.
local function may_sit(hold, limit)
  return owns_seat(hold.user) or (room.listed[hold.alias] ~= nil and total.owns_seat < limit)
end

local function arrived(alias, who, limit, now, joined_by)
  local at, key = key_of(alias, who.sid), key_of(alias, who.identity)
  if room.ended[at] then return end
  local issued = reserved[key]
  if issued and issued.began > joined_by then issued = nil end
  local hold = sessions[at]
  if hold then
    if issued then move(issued, 'replace', now) end
  elseif issued and issued.user == who.user then
    hold = issued
    hold.sid = who.sid
    move(hold, 'arrive', now)
  else
    hold = {id = who.sid, user = who.user, state = owns_seat(who.user) and 'present' or 'unseated', alias = alias,
            identity = who.identity, sid = who.sid, began = now, expires = 0}
    put_session(hold)
  end
  room.chains[who.user] = nil
  if hold.state == 'unseated' and (not limit or may_sit(hold, limit)) then move(hold, 'seat', now) end
end

function Seats.arrive(now, alias, who, limit)
  room.touched = now
  if not limit then room.unlimited_at = now end
  if who.joined and (room.listed[alias] or who.joined) >= who.joined + OVERTAKEN_BY then return end
  arrived(alias, who, limit, now, who.joined or now)
end

-- The device that an identity of /sfu/get names in clear; '' if this is none of that user's.
local function device_named_by(identity, user)
  return identity:sub(1, #user + 1) == user .. ':' and identity:sub(#user + 2) or ''
end

-- End the holds of tokens that the device of an identity was given for the same call and did not use.
local function end_unused(user, alias, identity, left_by, now)
  local device = device_named_by(identity, user)
  if device == '' then return end
  for _, hold in ipairs(reserved_for(user)) do
    if hold.device == device and hold.alias == alias and hold.identity ~= identity and hold.sid == ''
      and hold.began <= left_by then
      move(hold, 'leave', now)
    end
  end
end

function Seats.leave(now, alias, sid, identity, left_by, by_choice)
  room.touched = now
  local at = key_of(alias, sid)
  room.ended[at] = now
  local issued = reserved[key_of(alias, identity)]
  local hold = sessions[at]
  local known = hold or issued
  if by_choice and known then end_unused(known.user, alias, identity, left_by, now) end
  if by_choice and issued and (issued.began <= left_by or sid ~= '' and issued.sid == sid) then move(issued, 'leave', now) end
  if hold then move(hold, by_choice and 'leave' or 'vanish', now) end
end

local function forget_ended(now)
  for at, ended in pairs(room.ended) do
    if ended <= now - ENDED_SESSIONS_KEPT then room.ended[at] = nil end
  end
end

-- By the time they joined.
local function by_age(present)
  local sorted = {}
  for place, who in ipairs(present) do
    sorted[place] = {who = who, place = place, joined = who.joined or 0}
  end
  table.sort(sorted, function(a, b)
    if a.joined ~= b.joined then return a.joined < b.joined end
    return a.place < b.place
  end)
  return sorted
end

-- Tokens that were issued while the roster was unknown get the seats that are free, first come first served.
function Seats.seat_failed_open(now, limit)
  for _, hold in ipairs(holds_where(function(hold) return hold.state == 'issued_unseated' end)) do
    if owns_seat(hold.user) or total.owns_seat < limit then move(hold, 'seat', now) end
  end
end

function Seats.apply_listing(now, alias, present, limit, since)
  local listed = room.listed[alias]
  if listed and since < listed then return end  -- a later listing overtook it
  room.listed[alias] = since
  room.touched = now
  if not limit then room.unlimited_at = now end
  local there = {}
  for _, entry in ipairs(by_age(present)) do
    local who = entry.who
    local at = key_of(alias, who.sid)
    there[at] = true
    if room.ended[at] and room.ended[at] < since then room.ended[at] = nil end
    local before = not listed and (not who.joined or who.joined <= room.unlimited_at)
    arrived(alias, who, not before and limit or nil, now, since)
  end
  for _, hold in ipairs(holds_where(function(hold)
    return TABLE[hold.state].in_call and hold.alias == alias and hold.began < since
      and not there[key_of(alias, hold.sid)]
  end)) do move(hold, 'vanish', now) end
  for _, hold in ipairs(holds_where(function(hold)
    return TABLE[hold.state].unconfirmed and (hold.alias == alias or hold.alias == '') and hold.expires <= since
  end)) do move(hold, 'confirm', now) end
  if limit then Seats.seat_failed_open(now, limit) end
  forget_ended(now)
end

function Seats.overflow(now, limit)
  local over = {}
  for _, hold in ipairs(holds_where(function(hold) return hold.state == 'unseated' end)) do
    if not limit or may_sit(hold, limit) then
      move(hold, 'seat', now)
    elseif total.removes >= limit and room.listed[hold.alias] then
      over[#over + 1] = hold
    end
  end
  return over
end

function Seats.seat_everybody(now)
  for _, hold in ipairs(holds_where(function(hold) return hold.state == 'unseated' end)) do move(hold, 'seat', now) end
end

-- Returns whether this is new: somebody who waits may find a seat.
function Seats.exempt(now, name)
  local user = users[name]
  if user and not user.exempt then
    for _, column in ipairs(COUNTED) do
      if user[column] > 0 then total[column] = total[column] - 1 end
    end
    user.exempt, room.exempt[name] = true, true
    return true
  end
  return false
end

function Seats.rename(now, alias, identity, name)
  for _, hold in ipairs(holds_where(function(hold)
    return TABLE[hold.state].in_call and hold.alias == alias and hold.identity == identity and hold.user ~= name
  end)) do
    local nobody = hold.user
    uncount(hold)
    hold.user = name
    count(hold)
    forget(nobody)
  end
end

-- Take over a hold that another run or another guard issued.
function Seats.restore(now, hold_id, user, alias, identity, present, expires, device)
  if known(hold_id) then return end
  put_reserved(key_of(alias, identity), {
    id = hold_id, user = user, state = present and 'left' or 'issued', alias = alias, identity = identity, sid = '',
    began = now, expires = present and math.min(now, expires) or expires, device = device,
  })
  room.vacated = math.max(room.vacated, now)
end

-- The sessions of an identity came with a token that had a seat.
function Seats.seat_sessions(now, alias, identity, user)
  Seats.rename(now, alias, identity, user)
  for _, hold in ipairs(holds_where(function(hold)
    return hold.state == 'unseated' and hold.alias == alias and hold.identity == identity
  end)) do move(hold, 'seat', now) end
end

function Seats.knows(alias, identity)
  local key = key_of(alias, identity)
  return reserved[key] ~= nil or sessions_of[key] ~= nil
end

-- Requests in flight end, and every SFU room has to be listed again: the data set may be an older one.
function Seats.distrust(now)
  for _, hold in ipairs(holds_where(function(hold) return hold.state == 'pending' end)) do
    move(hold, 'release', now)
  end
  room.listed = {}
end

-- The server's clock was set back: what was written before counts from the new time.
function Seats.shift(by)
  room.unlimited_at, room.touched, room.vacated = room.unlimited_at + by, room.touched + by, room.vacated + by
  if room.waited_until then room.waited_until = room.waited_until + by end
  for _, hold in ipairs(holds_where(function() return true end)) do
    hold.began, hold.expires = hold.began + by, hold.expires + by
    if hold.lease then hold.lease = hold.lease + by end
  end
  for alias, since in pairs(room.listed) do room.listed[alias] = since + by end
  for at, ended in pairs(room.ended) do room.ended[at] = ended + by end
  for _, chain in pairs(room.chains) do
    chain.expires, chain.asked = chain.expires + by, chain.asked + by
  end
end

-- How many requests in flight of a guard are renewed.
function Seats.renew(now, hold_ids, lease)
  local renewed = 0
  for _, hold_id in ipairs(hold_ids) do
    if pending[hold_id] then
      pending[hold_id].lease = lease
      renewed = renewed + 1
    end
  end
  return renewed
end

-- questions --------------------------------------------------------------------------------------------------------

local function names_of(found)
  local names, seen = {}, {}
  for _, hold in ipairs(found) do
    if not seen[hold.user] then
      seen[hold.user] = true
      names[#names + 1] = hold.user
    end
  end
  return names
end

function Seats.owns_seat(now, user) return owns_seat(user) end
function Seats.is_exempt(now, user) return user_of(user).exempt end
function Seats.seats_taken(now) return total.takes_seat end

function Seats.sessions(now) return holds_where(function(hold) return TABLE[hold.state].in_call end) end
function Seats.users(now) return names_of(Seats.sessions(now)) end

-- Users who have a seat, have no request in flight, and are not in the call as far as we know.
function Seats.awaited(now)
  return names_of(holds_where(function(hold)
    return hold.state ~= 'pending' and not TABLE[hold.state].in_call and TABLE[hold.state].owns_seat
  end))
end

-- Users who are in the call, have a token in time, or have a request in flight.
function Seats.occupants(now)
  return names_of(holds_where(function(hold)
    return not TABLE[hold.state].unconfirmed
  end))
end

function Seats.aliases(now)
  local names = {}
  for alias in pairs(aliases) do
    if alias ~= '' then names[#names + 1] = alias end
  end
  return names
end

function Seats.listing_required_since(now)
  local latest
  for _, hold in ipairs(holds_where(function(hold) return TABLE[hold.state].unconfirmed end)) do
    if not latest or hold.expires > latest then latest = hold.expires end
  end
  return latest
end

function Seats.is_idle(now) return next(users) == nil end

-- Whether anybody is in the call or has a token in time, as far as we know; requests in flight do not count.
function Seats.is_occupied(now)
  for i = 1, last do
    if list[i] and list[i].state ~= 'pending' and not TABLE[list[i].state].unconfirmed then return true end
  end
  return false
end

-- Drop what no delayed event can refer to any more.
function Seats.forget_old(now, ttl, listing_kept)
  forget_ended(now)
  for _, hold in ipairs(holds_where(function(hold)
    return TABLE[hold.state].unconfirmed and hold.expires + UNCONFIRMED_KEPT <= now
  end)) do move(hold, 'confirm', now) end
  for user, chain in pairs(room.chains) do
    if chain.asked + ttl < now then room.chains[user] = nil end
  end
  for alias, since in pairs(room.listed) do
    if not aliases[alias] and since < now - listing_kept then room.listed[alias] = nil end
  end
end
